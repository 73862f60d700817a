"""Back to PyTorch: a compiled graph as a module that trains, under the names of the original."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.capture import capture
from compressor.data import synthetic
from compressor.errors import UnsupportedError, UsageError
from compressor.ir import Graph
from compressor.ops import arguments, kind
from compressor.pipeline import Context, Pipeline, parse
from compressor.registry import passes, target
from compressor.trainable import Trainable, graph_of, trainable


class Block(nn.Module):
    """Every kind of mode and name: batch norm, both dropouts, a tied weight, a buffer outside the state dict."""

    def __init__(self, **norm: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16, **norm)  # type: ignore[arg-type]
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.spatial = nn.Dropout2d(0.3)
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 12)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.layers[1].weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(self.conv2(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)) * self.scale
        for layer in self.layers:
            y = F.relu(layer(y))
        return self.head(self.drop(F.relu(self.tied(y))))


def settled(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Batch norm statistics of data, so that the mode makes a difference."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8) * 2 + 1


@pytest.fixture
def model(images: Tensor) -> nn.Module:
    return settled(Block(), images)


def run_passes(graph: Graph, spec: str) -> Graph:
    held_out = synthetic(graph.inputs, graph.example, samples=8, seed=0)
    table = passes()
    Pipeline(parse(spec, table), table).run(graph, Context(target("cpu"), held_out))
    return graph


# -------------------------------------------------------------------- names


def test_state_dict_is_the_original_one(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images))
    seen, expected = module.state_dict(), model.state_dict()
    assert list(seen) == list(expected)
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in module.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert all(p.requires_grad for p in module.parameters())
    fresh = Block()
    fresh.load_state_dict(seen)
    assert torch.equal(fresh.eval()(images), model(images))


def test_tied_tensors_stay_tied(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images))
    assert module.tied.weight is module.layers.get_submodule("1").weight
    assert len(list(module.parameters())) == len(list(model.parameters()))


def test_tensors_that_overlap_still_do(images: Tensor) -> None:
    graph = capture(Block().eval(), images)
    whole = torch.randn(16, 16)
    graph.tensors["layers.0.weight"], graph.tensors["layers.1.weight"] = whole[:12, :8], whole[:12, :12]
    module = trainable(graph)
    with torch.no_grad():
        module.get_parameter("layers.1.weight").fill_(7.0)
    assert torch.equal(module.get_parameter("layers.0.weight"), torch.full((12, 8), 7.0))
    assert not torch.equal(whole[:12, :12], torch.full((12, 12), 7.0))


def test_the_callers_tensors_are_not_written(model: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, images)
    print_ = graph.fingerprint()
    module = trainable(graph).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(images).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert graph.fingerprint() == print_
    assert not torch.equal(module.head.weight, model.head.weight)


def test_a_name_that_the_module_has_for_itself_is_refused(images: Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.receipt = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.receipt(x)

    with pytest.raises(UnsupportedError, match="a part of the model is called 'receipt'"):
        trainable(capture(Named(), images))


# -------------------------------------------------------------------- numbers and modes


def test_evaluation_is_the_graph_bit_for_bit(model: nn.Module, images: Tensor) -> None:
    graph = capture(model, images)
    module = trainable(graph)
    for batch in (images, images[:1], images[:5]):
        assert torch.equal(module(batch), graph.run(batch)[0])
    assert torch.allclose(module(images), model(images), atol=1e-6)
    with torch.no_grad():
        module.head.bias += 0.1
    assert not torch.allclose(module(images), model(images), atol=1e-6)


@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"momentum": 0.3}, {"affine": False}], ids=str)
def test_statistics_move_in_training_as_the_originals_do(norm: dict, images: Tensor) -> None:
    model = settled(Block(**norm), images)
    module = trainable(capture(model, images))
    module(images)
    assert torch.equal(module.bn1.running_mean, model.bn1.running_mean)
    assert module.bn1.num_batches_tracked == model.bn1.num_batches_tracked == 3
    for part in (model, module.train()):
        part.train()
        for shift in (1.0, 3.0):
            torch.manual_seed(1)
            seen = part(images + shift)
        if part is model:
            expected = seen
    assert torch.allclose(seen, expected, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(module.bn1, name), getattr(model.bn1, name), atol=1e-6), name
    assert module.bn1.num_batches_tracked == 5
    frozen = module.bn1.running_mean.clone()
    module.eval()(images)
    assert torch.equal(module.bn1.running_mean, frozen)
    assert torch.allclose(module(images), model.eval()(images), atol=1e-5)


def test_one_batch_norm_can_be_frozen(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images)).train()
    module.bn1.eval()
    before = module.bn1.running_mean.clone()
    module(images)
    assert torch.equal(module.bn1.running_mean, before)


@pytest.mark.parametrize("name", ["drop", "spatial"])
def test_dropout_is_random_in_training_only(name: str, model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images))
    assert torch.equal(module(images), module(images))
    module.get_submodule(name).train()
    assert not torch.equal(module(images), module(images))
    module.eval()
    assert torch.equal(module(images), module(images))


def test_modes_of_the_model_itself() -> None:
    """A model that is one batch norm, and dropout as a function."""

    class Functional(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    images = torch.randn(8, 3, 4, 4)
    model = settled(Functional(3), images)
    module = trainable(capture(model, images))
    assert list(module.state_dict()) == list(model.state_dict())
    assert torch.equal(module(images), module(images))
    assert not torch.equal(module.train()(images), module(images))
    assert module.num_batches_tracked == 5


def test_other_modes_switch_too(images: Tensor) -> None:
    class Modes(nn.Module):
        """Instance norm with statistics, random leaks, and dropout between the layers of a recurrent network."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
            self.leak = nn.RReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.leak(self.norm(x))

    model = settled(Modes(), images)
    module = trainable(capture(model, images))
    assert torch.allclose(module(images), model(images), atol=1e-6)
    assert list(module.state_dict()) == list(model.state_dict())
    before = module.norm.running_mean.clone()
    assert not torch.equal(module.train()(images), module(images))
    assert not torch.equal(module.norm.running_mean, before)


def test_a_step_of_training_reduces_the_loss_and_reaches_every_parameter(
    model: nn.Module, images: Tensor
) -> None:
    graph = run_passes(capture(model, images), "prune(macs=0.6,minimum=2)")
    assert any(kind(node) == "batch_norm" for node in graph.nodes)
    assert sum("dropout" in str(node.target) for node in graph.nodes) == 2
    module = trainable(graph)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.conv1.weight.shape[0] < model.conv1.weight.shape[0]
    labels = torch.arange(16) % 5
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    before = F.cross_entropy(module(images), labels).item()
    module.train()
    for _ in range(60):
        loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        assert all(float(p.grad.abs().max()) > 0 for p in module.parameters() if p.dim() > 1)
        optimizer.step()
    module.eval()
    assert F.cross_entropy(module(images), labels).item() < 0.8 * before


@pytest.mark.parametrize("spec", ["merge", "prune", "merge,prune(macs=0.5,minimum=2)", "merge,prune,squeeze"])
def test_passes_keep_dropout_and_batch_norm(spec: str, model: nn.Module, images: Tensor) -> None:
    graph = run_passes(capture(model, images), spec)
    modes = [
        arguments(node).get("train", arguments(node).get("training"))
        for node in graph.nodes
        if "dropout" in str(node.target) or kind(node) == "batch_norm"
    ]
    assert modes == [False, False, False]
    module = trainable(graph)
    assert torch.equal(module(images), graph.run(images)[0])
    assert not torch.equal(module.train()(images), module(images))


def test_weights_that_a_pass_made_train(model: nn.Module, images: Tensor) -> None:
    graph = run_passes(capture(model, images), "fold")
    module = trainable(graph)
    assert not [name for name in module.state_dict() if name.startswith("bn1.")]
    assert module.conv1.bias.requires_grad
    assert torch.equal(module(images), graph.run(images)[0])
    assert capture(module).text() == graph.text()


# -------------------------------------------------------------------- signature


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.embed(ids) * mask[..., None] + torch.zeros_like(places)[None, :, None]
        return {"logits": self.head(hidden), "hidden": hidden}


def test_inputs_by_position_and_by_name_and_a_dict_back() -> None:
    model = Named().eval()
    batch = {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": torch.ones(2, 5)}
    module = trainable(capture(model, {"batch": batch}))
    expected = model(batch)
    for seen in (
        module(batch["input_ids"], batch["attention_mask"]),
        module(batch_attention_mask=batch["attention_mask"], batch_input_ids=batch["input_ids"]),
    ):
        assert list(seen) == ["logits", "hidden"]
        assert all(torch.equal(seen[name], expected[name]) for name in seen)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.head.weight is module.embed.weight


def test_several_outputs_are_a_tuple(images: Tensor) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    first, second = trainable(capture(Pair(), images))(images)
    assert torch.equal(first, images + 1)
    assert torch.equal(second, images * 2)


# -------------------------------------------------------------------- as a module among others


def test_moves_to_another_device_with_all_that_it_makes() -> None:
    batch = {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": torch.ones(2, 5)}
    module = trainable(capture(Named().eval(), {"batch": batch})).to("meta")
    seen = module(*(t.to("meta") for t in batch.values()))
    assert {t.device.type for t in seen.values()} == {"meta"}


def test_copies_saves_and_loads(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    module = trainable(capture(model, images))
    twin = copy.deepcopy(module)
    assert isinstance(twin, Trainable)
    assert twin.tied.weight is twin.layers.get_submodule("1").weight
    twin.train()(images).sum().backward()
    assert module.bn1.num_batches_tracked == 3
    assert twin.bn1.num_batches_tracked == 4
    assert module.head.weight.grad is None
    torch.save(twin.state_dict(), tmp_path / "weights.pt")
    module.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(module(images), twin.eval()(images))
    with pytest.raises(TypeError, match=r"keep its state_dict\(\)"):
        torch.save(module, tmp_path / "module.pt")


def test_runs_under_autocast(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(images)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


# -------------------------------------------------------------------- and back again


def test_capture_of_the_module_is_the_same_graph_with_new_weights(model: nn.Module, images: Tensor) -> None:
    graph = run_passes(capture(model, images), "prune(macs=0.6,minimum=2)")
    module = trainable(graph)
    assert capture(module).text(provenance=True) == graph.text(provenance=True)
    module.train()(images).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-2).step()
    again = capture(module, images)
    assert module.training
    assert again.text(provenance=True) == graph.text(provenance=True)
    assert again.inputs == graph.inputs
    assert torch.equal(again.run(images)[0], module.eval()(images))
    assert not torch.allclose(again.run(images)[0], graph.run(images)[0], atol=1e-4)


def test_a_users_export_of_the_module_has_the_same_names_and_sites(model: nn.Module, images: Tensor) -> None:
    graph = run_passes(capture(model, images), "prune(macs=0.6,minimum=2)")
    module = trainable(graph)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},), strict=False)
    again = capture(program)
    assert {**again.tensors}.keys() == graph.tensors.keys()
    ours, theirs = (
        [
            line.rpartition("# ")[2]
            for line in one.text(provenance=True).splitlines()
            if "conv" in line or "lin" in line
        ]
        for one in (graph, again)
    )
    assert sorted(ours) == sorted(theirs)
    assert torch.equal(again.run(images[:3])[0], graph.run(images[:3])[0])


def test_a_head_of_another_width_is_taken_as_it_is(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images))
    module.head = nn.Linear(12, 9)
    graph = capture(module)
    assert graph.results[0].meta["val"].shape[1] == 9
    assert torch.equal(graph.run(images)[0], module.eval()(images))


def test_what_no_longer_fits_the_graph_is_refused(model: nn.Module, images: Tensor) -> None:
    module = trainable(capture(model, images))
    with pytest.raises(UsageError, match=r"the module takes x:f32\[batch,3,8,8\]"):
        capture(module, images[:, :2])
    with pytest.raises(UsageError, match="the module takes x"):
        capture(module, (images, images))
    with pytest.raises(UsageError, match="knows its inputs"):
        capture(module, inputs=capture(model, images).inputs)
    half = copy.deepcopy(module).half()
    with pytest.raises(UsageError, match="float16, and the module was made with torch.float32"):
        capture(half)
    module.head = nn.Identity()
    with pytest.raises(UsageError, match=r"no tensor head\.\w+ any more"):
        capture(module)


def test_integers_do_not_train(model: nn.Module, images: Tensor) -> None:
    result = compressor.compress(
        model, images, passes="fold,int8", calibration=images, stop_after="int8", measure=False
    )
    with pytest.raises(UsageError, match="a quantised graph does not train: leave int8 out"):
        result.trainable()


def test_dropouts_that_capture_lost_are_named(images: Tensor) -> None:
    class Written(nn.Module):
        """Writes into a view, which no renaming undoes."""

        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x) * 2
            y[:, :1].mul_(3)
            return y

    with pytest.warns(UserWarning, match="1 dropouts of the model are gone"):
        trainable(capture(Written().eval(), images))
    assert graph_of(trainable(capture(Block().eval(), images))).origin.lost_dropouts == 0
