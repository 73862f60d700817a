"""Distillation: what is learned, when nothing is, and that a run can be repeated, stopped and gone on with."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from nets import Net, conv
from torch import nn

from compressor import data, learning
from compressor.augment import augmented, is_image
from compressor.capture import capture
from compressor.data import Batch, Data
from compressor.distillation import Lesson, shared_values
from compressor.errors import DataError, FileError, OutputError, UsageError
from compressor.ir import Input
from compressor.pipeline import BOUNDED, Context, Outcome, Pipeline, parse
from compressor.samples import Samples
from compressor.student import Student, write
from passes import PASSES
from passes.distill import Distill
from targets.cpu import CPU

TARGET = replace(CPU, channel_multiple=1)
CUT = "prune(macs=0.6,criterion=l2,repair=false)"
QUICK = Distill(epochs=12, minutes=None, batch=16, lr=0.02)


def residual(measured=True):
    """Two residual blocks with batch norms between an entry and a linear; their statistics are those of images."""
    torch.manual_seed(0)

    def forward(net, x):
        x = torch.relu(net.norm(net.entry(x)))
        x = torch.relu(x + net.norm2(net.second(torch.relu(net.norm1(net.first(x))))))
        x = torch.relu(x + net.norm4(net.fourth(torch.relu(net.norm3(net.third(x))))))
        return net.head(x.mean((2, 3)))

    parts = {name: conv(8, 8) for name in ("first", "second", "third", "fourth")}
    norms = {name: nn.BatchNorm2d(8) for name in ("norm", "norm1", "norm2", "norm3", "norm4")}
    net = Net(forward, entry=conv(3, 8), head=nn.Linear(8, 5), **parts, **norms)
    with torch.no_grad():
        for norm in norms.values():
            norm.momentum = 1.0 if measured else 0.1
        net.train()(images(64))
    return net.eval()


@cache
def _captured():
    return capture(residual(), images(2))


def blocks():
    """The graph of `residual()`, captured once."""
    return _captured().copy()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def images(count, seed=1):
    """Noise of a colour and strength that differ from one to the next."""
    draw = torch.Generator().manual_seed(seed)
    colour, strength = torch.randn(count, 3, 1, 1, generator=draw), torch.rand(count, 1, 1, 1, generator=draw)
    return colour + 2 * strength * torch.randn(count, 3, 8, 8, generator=draw)


def context(graph, stream, seed=0, **more):
    """The stream's samples to learn from, others of the same kind to judge by."""
    calibration = data.open_data(stream, graph.inputs)
    return Context(TARGET, calibration.limited(16), calibration, seed, **more)


def distilled(graph, original, stream, one=QUICK, **more):
    ctx = context(original, stream, original=original, **more)
    return one.run(graph, ctx)


def noisy(graph, size=0.3, names=("weight",)):
    """A copy whose weights have lost something."""
    twin = graph.copy()
    draw = torch.Generator().manual_seed(3)
    for node in twin.nodes:
        if node.op == "get_attr" and str(node.target) in twin.parameters and str(node.target).endswith(names):
            value = twin.tensor(node)
            noise = torch.randn(value.shape, generator=draw) * size * value.std()
            twin.set_tensor(node, value + noise)
    return twin


def error(original, graph, *inputs):
    """Squared error of the worst output, relative to its variance from sample to sample."""
    pairs = zip(original.run(*inputs), graph.run(*inputs), strict=True)
    return max(float((a - b).square().mean() / a.var(0).mean()) for a, b in pairs if a.is_floating_point())


# -------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("spec", ["distill", "fold,distill"])
def test_a_pruned_network_recovers(spec):
    graph = blocks()
    original = graph.copy()
    ctx = context(graph, [(images(128),)])
    passes = [one if one.name != "distill" else QUICK for one in parse(f"{CUT},{spec}", PASSES)]
    only = graph.copy()
    Pipeline(passes[:-1], PASSES).run(only, ctx)
    rows = Pipeline(passes, PASSES).run(graph, ctx)
    test = images(64, seed=9)
    assert error(original, graph, test) < 0.5 * error(original, only, test)
    assert rows[-1].contract == "bounded" and rows[-1].status in ("proved", "warned")
    assert rows[-1].facts["error_after"] < 0.5 * rows[-1].facts["error_before"]
    assert "tensors learned from the original" in rows[-1].rewrites[0].what


def test_the_loss_is_measured_against_the_original_not_against_the_start():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    original, start = graph.copy(), noisy(graph)
    x = torch.randn(96, 6)
    outcome = distilled(start, original, [(x,)], replace(QUICK, epochs=40))
    assert outcome.reference is original and Distill.contract is BOUNDED
    assert error(original, start, x) < 0.1 * error(original, noisy(graph), x)


def test_several_outputs_and_padded_text():
    def forward(net, ids, mask):
        x = net.table(ids) * mask[:, :, None].float()
        x = x + torch.tanh(net.mix(x))
        return net.tag(x), net.topic(x.sum(1)), ids + 1

    torch.manual_seed(0)
    parts = dict(table=nn.Embedding(20, 8), mix=nn.Linear(8, 8), tag=nn.Linear(8, 4), topic=nn.Linear(8, 3))
    ids = torch.randint(1, 20, (2, 6))
    inputs = [data.parse_input(f"{name}:i64[batch,sequence]") for name in ("x", "mask")]
    graph = capture(Net(forward, **parts), (ids, torch.ones_like(ids)), inputs=inputs)
    draw = torch.Generator().manual_seed(5)
    batches = []
    for length in (5, 7, 9) * 4:
        ids = torch.randint(1, 20, (8, length), generator=draw)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (8, 1), generator=draw)).long()
        batches.append((ids * mask, mask))
    start = noisy(graph)
    before = [error(graph, start, *batch) for batch in batches]
    outcome = distilled(start, graph, batches, replace(QUICK, epochs=20, batch=8))
    assert outcome.rewrites and outcome.facts["error_after"] < 0.3 * outcome.facts["error_before"]
    assert sum(error(graph, start, *batch) for batch in batches) < 0.3 * sum(before)


def test_padding_does_not_count():
    """The row of the padding's token was lost: nobody asks for it. Without the mask's name it is asked for."""

    def lesson(model):
        torch.manual_seed(0)
        ids, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        graph = capture(model(), (ids, mask))
        start = graph.copy()
        table = next(n for n in start.nodes if n.op == "get_attr")
        lost = start.tensor(table).clone()
        lost[0] = 7
        start.set_tensor(table, lost)
        stream = data.open_data([(ids.repeat(16, 1), mask.repeat(16, 1))], graph.inputs)
        return Lesson(graph, start, Samples(stream, graph.inputs), Distill()._recipe(0))

    class WithMask(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids, attention_mask):
            return self.table(ids) + 0 * attention_mask[:, :, None]

    class Other(WithMask):
        def forward(self, ids, segments):
            return super().forward(ids, segments)

    assert "nothing to learn" in lesson(WithMask).obstacle()
    assert lesson(Other).obstacle() == "" and lesson(Other).evaluate() > 0.1


def test_batch_norms_keep_statistics_that_suit_the_model_better_than_those_of_the_data():
    def lesson(measured):
        graph = capture(residual(measured), images(2))
        stream = context(graph, [(images(96),)]).calibration
        made = Lesson(graph, noisy(graph, 0.05), Samples(stream, graph.inputs), QUICK._recipe(0))
        before = made.evaluate()
        return made, before, made.choose_statistics(before)

    made, before, after = lesson(measured=True)
    assert made.batch_statistics and after != before
    made, before, after = lesson(measured=False)
    assert not made.batch_statistics and after == before == made.evaluate()
    made.estimate()
    assert made.evaluate() == before


def test_tied_weights_stay_tied_and_nobody_writes_into_the_callers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 6)
            self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.mix(self.table(ids))))

    torch.manual_seed(0)
    model = Tied()
    ids = torch.randint(0, 12, (64, 4))
    graph = capture(model, ids[:2])
    start = noisy(graph, names=("mix.weight",))
    marks = graph.fingerprint(), [p.clone() for p in model.parameters()]
    size = len({t.data_ptr() for t in start.tensors.values()})
    outcome = distilled(start, graph, [(ids,)], replace(QUICK, epochs=20))
    assert outcome.rewrites and outcome.facts["error_after"] < outcome.facts["error_before"]
    assert len({t.data_ptr() for t in start.tensors.values()}) == size
    assert graph.fingerprint() == marks[0] and all(map(torch.equal, model.parameters(), marks[1]))


def test_two_names_of_one_memory_are_one_parameter_and_a_transposed_view_stays():
    graph = capture(
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), (torch.randn(2, 4),)
    )
    first, second = (n for n in graph.nodes if n.op == "get_attr")
    graph.set_tensor(second, graph.tensor(first))
    student = Student(graph, graph.results, torch.contiguous_format)
    assert len(set(student.parameters.values())) == 1 and len(student.parameters) == 2 and not student.frozen
    names = write(graph, {name: torch.full((4, 4), 2.0) for name in student.parameters})
    assert len(names) == 2 and graph.tensor(first).data_ptr() == graph.tensor(second).data_ptr()
    graph.set_tensor(second, graph.tensor(first).t())
    student = Student(graph, graph.results, torch.contiguous_format)
    assert not student.parameters and sorted(student.frozen) == sorted([first.target, second.target])


def test_a_residual_stream_is_what_both_graphs_share():
    graph = blocks()
    narrow = graph.copy()
    inner = CUT.replace(")", ",ignore=entry*+second*)")
    Pipeline(parse(inner, PASSES), PASSES).run(narrow, context(graph, [(images(32),)]))
    pairs = shared_values(graph, narrow, 16)
    assert [(a.name, b.name) for a, b in pairs] == [("relu", "relu"), ("relu_2", "relu_2")]
    stream = graph.copy()
    Pipeline(parse(CUT.replace(")", ",scope=local)"), PASSES), PASSES).run(
        stream, context(graph, [(images(32),)])
    )
    assert [a.name for a, _ in shared_values(graph, stream, 16)] == ["relu", "relu_2"]
    data_of = context(graph, [(images(32),)]).calibration
    lesson = Lesson(graph, stream, Samples(data_of, graph.inputs), QUICK._recipe(0))
    inputs = lesson.inputs(lesson.held_out[0])
    wanted, seen = lesson.teacher(inputs)[1], lesson.student.module(*inputs)[1]
    left = stream.lineage["relu"][1]
    assert wanted.shape[1] == len(left) < 8  # of the stream's channels, those that were not pruned
    assert torch.allclose(wanted, seen, 1e-4, 1e-5)
    stream.lineage["relu"][1] = (left + 1) % 8
    wrong = Lesson(graph, stream, Samples(data_of, graph.inputs), QUICK._recipe(0)).teacher(inputs)[1]
    assert not torch.allclose(wrong, seen, 0.1, 0.1)


def test_a_batch_that_memory_has_no_room_for_is_learned_in_parts():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    stream = data.open_data([(torch.randn(64, 6),)], graph.inputs)
    lesson = Lesson(graph, noisy(graph), Samples(stream, graph.inputs), QUICK._recipe(0))
    places = lesson.batches(0)[0]
    (whole,) = lesson.losses(places, 0)
    (wanted,) = torch.autograd.grad(whole, [lesson.student.parameters["0.weight"]])
    lesson.room = 5
    parts = list(lesson.losses(places, 0))
    (seen,) = torch.autograd.grad(sum(parts), [lesson.student.parameters["0.weight"]])
    assert len(parts) == 4 and torch.allclose(sum(parts), whole, 1e-5)
    assert torch.allclose(seen, wanted, 1e-4, 1e-7) and not torch.allclose(parts[0], whole, 0.1)


def test_a_mask_that_layers_share_is_nothing_to_learn():
    def forward(net, x, mask):
        far = (1 - mask) * torch.finfo(torch.float32).min
        for layer in (net.one, net.two):
            x = x + torch.softmax(layer(x) + far, -1)
        return x

    parts = {"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}
    x, mask = torch.randn(64, 4), (torch.rand(64, 4) < 0.8).float()
    graph = capture(Net(forward, **parts), (x[:2], mask[:2]))
    assert [a.name for a, _ in shared_values(graph, graph, 8)] == ["add_1"]
    start = noisy(graph)
    outcome = distilled(start, graph, [(x, mask)])
    assert outcome.facts["error_after"] < 0.5 * outcome.facts["error_before"]


# -------------------------------------------------------------------- nothing to learn


def test_what_does_not_get_better_stays_as_it_was():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    start = noisy(graph, 1e-3)
    mark = start.fingerprint()
    outcome = distilled(start, graph, [(torch.randn(64, 6),)], replace(QUICK, lr=5.0, epochs=3))
    assert start.fingerprint() == mark and not outcome.rewrites
    assert "made nothing better on held-out samples" in outcome.declines[0].reason
    assert distilled(noisy(graph), graph, [(torch.randn(64, 6),)]).rewrites  # what can get better does


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    graph = capture(perceptron(), (torch.randn(2, 6),))
    monkeypatch.setattr(Lesson, "_loss", lambda self, inputs: torch.tensor(float("nan"), requires_grad=True))
    outcome = distilled(noisy(graph), graph, [(torch.randn(64, 6),)])
    assert not outcome.rewrites and "a lower lr may help" in outcome.declines[0].reason


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x).argmax(1)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x).masked_fill(x < 0, -torch.inf)


class Fixed(nn.Module):
    def forward(self, x):
        return x * 2 + 1


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        (perceptron, None, "still answers as the original does"),
        (Counts, "noise", "no output is a float"),
        (Masked, "noise", "NaN or infinite"),
        (Fixed, "scale", "no parameter moves an output"),
        (lambda: perceptron().half(), "noise", "half precision"),
    ],
)
def test_declines(model, change, reason):
    dtype = torch.float16 if "half" in reason else torch.float32
    graph = capture(model(), (torch.randn(2, 6, dtype=dtype),))
    start = noisy(graph) if change == "noise" else graph.copy()
    if change == "scale":
        product = next(n for n in start.nodes if n.target is torch.ops.aten.mul.Tensor)
        start.set_args(product, (product.args[0], 3))
    outcome = distilled(start, graph, [(torch.randn(32, 6, dtype=dtype),)])
    assert isinstance(outcome, Outcome) and not outcome.rewrites
    assert reason in outcome.declines[0].reason


def test_a_quantised_model_is_declined_and_the_order_says_why():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    original, ctx = graph.copy(), context(graph, [(torch.randn(64, 6),)])
    Pipeline(parse("int8", PASSES), PASSES).run(graph, ctx)
    outcome = QUICK.run(graph, replace(ctx, original=original))
    assert "stands before int8" in outcome.declines[0].reason
    with pytest.raises(UsageError, match="int8 must come after distill; write --passes 'distill,int8'"):
        Pipeline(parse("int8,distill", PASSES), PASSES)
    assert list(PASSES).index("squeeze") < list(PASSES).index("distill") < list(PASSES).index("fold")


def test_without_an_original_or_room_nothing_is_done():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    ctx = context(graph, [(torch.randn(64, 6),)])
    assert "no original" in QUICK.run(noisy(graph), ctx).declines[0].reason
    outcome = QUICK.run(noisy(graph), replace(ctx, original=graph, limit=0))
    assert not outcome.rewrites and "limit" in outcome.declines[0].reason


def test_only_a_pass_that_learns_keeps_the_original():
    seen = []

    class Looks(Distill):
        def run(self, graph, ctx):
            seen.append(ctx.original)
            return Outcome()

    class Blind(Looks):
        learns = False

    graph = capture(perceptron(), (torch.randn(2, 6),))
    for one in (Looks(), Blind()):
        Pipeline([one], PASSES).run(graph, context(graph, [(torch.randn(64, 6),)]))
    assert seen[0].text() == graph.text() and seen[0] is not graph and seen[1] is None


# -------------------------------------------------------------------- the same again, and going on


def weights(one, seed=0, **more):
    graph = blocks()
    start = noisy(graph)
    outcome = distilled(start, graph, [(images(64),)], one, seed=seed, **more)
    assert outcome.rewrites
    return start.fingerprint()


def test_one_seed_gives_one_result():
    one = replace(QUICK, epochs=4)
    assert weights(one) == weights(one) != weights(one, seed=1)


def interrupted(steps):
    """A progress that stops the run, as Ctrl-C does, after some steps."""

    @contextmanager
    def progress(title, total):
        done = []

        def advance(n):
            done.append(n)
            if len(done) > steps:
                raise KeyboardInterrupt

        yield advance

    return progress


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    whole = replace(QUICK, epochs=4)
    one = replace(whole, checkpoint=str(tmp_path / "run.ckpt"))
    with pytest.raises(KeyboardInterrupt):
        weights(one, progress=interrupted(6))
    found = torch.load(one.checkpoint, weights_only=True)["course"]
    assert found["step"] == 5 and len(list(tmp_path.iterdir())) == 1  # in the middle of the second epoch
    assert weights(one) == weights(whole)
    assert torch.load(one.checkpoint, weights_only=True)["course"]["stopped"]
    assert weights(one) == weights(whole)  # a run that is over is not made again


def test_a_checkpoint_of_another_run_or_none_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    one = replace(QUICK, epochs=1, lr=1e-3, checkpoint=str(path))
    weights(one)
    with pytest.raises(UsageError, match=r"belongs to a run with another options; delete it"):
        weights(replace(one, lr=2e-3))
    graph = blocks()
    with pytest.raises(UsageError, match="another data"):
        distilled(noisy(graph), graph, [(images(64, seed=5),)], one)
    with pytest.raises(UsageError, match="another model"):
        distilled(noisy(graph, 0.1), graph, [(images(64),)], one)
    content = path.read_bytes()
    for wrong in (b"", b"not a file of torch", content[: len(content) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(FileError, match="run.ckpt.: the file is damaged"):
            weights(one)
    torch.save([1, 2], path)
    with pytest.raises(FileError, match="no checkpoint of distill"):
        weights(one)
    with pytest.raises(OutputError, match="cannot be written"):
        weights(replace(one, checkpoint=str(tmp_path / "missing" / "run.ckpt")))


def test_the_schedule_ends_within_the_minutes():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    start = time.perf_counter()
    one = replace(QUICK, epochs=10**6, minutes=0.02, patience=2.0)
    outcome = distilled(noisy(graph), graph, [(torch.randn(64, 6),)], one)
    assert 0.6 < time.perf_counter() - start < 10  # a million epochs take an hour
    assert outcome.facts["clock_led"] and outcome.facts["stopped"] == "end of the schedule"
    assert outcome.facts["error_after"] < 0.2 * outcome.facts["error_before"]


def test_patience_counts_from_the_best_since_learning_began():
    """First steps make worse what they start from; that alone ends no run."""
    course = learning.Course(before=1.0, best=1.0)
    for number, error in enumerate([3.0, 2.0, 1.5, 1.2], 1):
        course.look(error, number / 10, dict)
    assert (course.low, course.low_at, course.stale, course.best, course.state) == (1.2, 0.4, 0, 1.0, None)
    course.look(0.5, 0.5, lambda: {"w": torch.ones(1)})
    course.look(0.6, 0.6, dict)
    assert (course.best, course.low_at, course.stale) == (0.5, 0.5, 1) and "w" in course.state


def test_a_run_without_gain_stops_early():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    one = replace(QUICK, epochs=40, lr=3.0, patience=0.1)
    outcome = distilled(noisy(graph, 1e-3), graph, [(torch.randn(64, 6),)], one)
    assert outcome.facts["stopped"] == "no better held-out error" and 5 <= outcome.facts["epochs"] < 40


# -------------------------------------------------------------------- samples


def test_images_are_varied_by_the_seed_alone():
    x = images(16)
    draw = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    first, again, other = augmented(x, draw(1)), augmented(x, draw(1)), augmented(x, draw(2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == x.shape
    assert not torch.equal(first, x) and torch.equal(x, images(16))
    assert x.amin() <= first.amin() and first.amax() <= x.amax()  # no number that no image has


@pytest.mark.parametrize(
    ("spec", "image"),
    [
        ("x:f32[?,3,32,32]", True),
        ("x:f32[?,1,28,28]", True),
        ("x:f32[?,64,8,8]", False),
        ("x:i64[?,3,32,32]", False),
        ("x:f32[?,3,32]", False),
        ("x:f32[?,128]", False),
    ],
)
def test_only_images_are_varied(spec, image):
    assert is_image(data.parse_input(spec)) is image


def test_what_is_no_image_is_learned_from_as_it_is():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    stream = data.open_data([(torch.randn(64, 6),)], graph.inputs)
    lesson = Lesson(graph, noisy(graph), Samples(stream, graph.inputs), QUICK._recipe(0))
    places = lesson.batches(0)[0]
    assert torch.equal(lesson.inputs(places, 3)[0], lesson.samples.gather(places)[0])
    net = blocks()
    stream = data.open_data([(images(64),)], net.inputs)
    for augment in (True, False):
        recipe = replace(QUICK, augment=augment)._recipe(0)
        lesson = Lesson(net, noisy(net), Samples(stream, net.inputs), recipe)
        places = lesson.batches(0)[0]
        assert torch.equal(lesson.inputs(places, 3)[0], lesson.samples.gather(places)[0]) is not augment


def test_samples_of_one_shape_stand_in_one_batch():
    inputs = (Input("ids", torch.int64, ("batch", "sequence")), Input("scale", torch.float32, (1,)))
    batches = [
        Batch((torch.full((5, length), 10 * i + length), torch.ones(1) * (i // 5)))
        for i, length in enumerate((4, 6, 4, 6, 4, 4))
    ]
    samples = Samples(Data(lambda: batches, [5] * 6, "ids"), inputs)
    places = samples.places()
    assert len(places) == 30
    drawn = samples.grouped(places, 8, torch.Generator().manual_seed(0))
    assert sorted(map(len, drawn)) == [5, 8, 8]  # 15 of length 4, 10 of length 6, 5 with another scale
    for batch in drawn:
        ids, scale = samples.gather(batch)
        assert ids.shape[0] == len(batch) and len({float(batches[i].inputs[1]) for i, _ in batch}) == 1
        assert scale.shape == (1,)
    assert sum(map(len, samples.grouped(places, 8))) == 30
    assert samples.fingerprint() == Samples(Data(lambda: batches, [5] * 6, "ids"), inputs).fingerprint()
    assert samples.fingerprint() != Samples(Data(lambda: batches[1:], [5] * 5, "ids"), inputs).fingerprint()


def test_a_static_batch_is_filled_or_refused():
    graph = capture(perceptron(), (torch.randn(4, 6),), inputs=[data.parse_input("x:f32[4,6]")])
    outcome = distilled(noisy(graph), graph, [(torch.randn(48, 6),)])
    assert outcome.rewrites and outcome.facts["judging"] == 4
    stream = data.open_data([(torch.randn(12, 6),)], graph.inputs)
    big = capture(perceptron(), (torch.randn(12, 6),), inputs=[data.parse_input("x:f32[12,6]")])
    outcome = QUICK.run(noisy(big), Context(TARGET, stream, stream, original=big))
    assert "too few samples to fill the model's batches of 12" in outcome.declines[0].reason


# -------------------------------------------------------------------- errors


def test_it_learns_from_all_there_is_and_not_from_what_statistics_see():
    graph = capture(perceptron(), (torch.randn(4, 6),))
    draw = torch.Generator().manual_seed(3)
    lessons = data.open_data([(torch.randn(96, 6, generator=draw),)], graph.inputs)
    ctx = context(graph, [(torch.randn(32, 6, generator=draw),)], original=graph)
    for given, count in ((ctx, 32), (replace(ctx, lessons=lessons), 96)):
        facts = QUICK.run(noisy(graph), given).facts
        assert facts["samples"] + facts["judging"] == count


def test_no_data_says_what_to_pass():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    ctx = replace(context(graph, [(torch.randn(64, 6),)]), calibration=None, original=graph)
    with pytest.raises(UsageError, match=r"learns from data.*--calib FILE"):
        QUICK.run(noisy(graph), ctx)


def test_too_few_samples_are_refused():
    graph = capture(perceptron(), (torch.randn(2, 6),))
    with pytest.raises(DataError, match="too few to learn from; give it at least 8 samples"):
        distilled(noisy(graph), graph, [(torch.randn(6, 6),)])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("distill(epochs=0)", r"distill\(epochs=0\): at least 1"),
        ("distill(batch=0)", "at least 1"),
        ("distill(lr=0)", "above 0"),
        ("distill(minutes=-1)", "above 0"),
        ("distill(patience=0)", "above 0"),
        ("distill(features=-1)", "from 0 up"),
        ("distill(epoch=3)", "did you mean 'epochs'"),
    ],
)
def test_wrong_options_are_named(spec, words):
    with pytest.raises(UsageError, match=words):
        parse(spec, PASSES)


def test_the_spec_reads_every_option():
    (one,) = parse("distill(minutes=none,augment=false,checkpoint=run.ckpt,lr=1e-3)", PASSES)
    assert one == Distill(minutes=None, augment=False, checkpoint="run.ckpt", lr=1e-3)
    assert parse(str(one), PASSES) == [one]
