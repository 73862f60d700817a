"""Texts as data: the files that hold them, the model's own tokenizer, batches of one length, and the command line."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from compressor import texts
from compressor.data import Data, open_data, split
from compressor.errors import DataError, FileError, UsageError
from compressor.ir import Input
from compressor.records import records
from compressor.texts import Reading

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "the a cat dog sat on mat red blue big small and it was very good bad film plot story".split()  # noqa: SIM905
PAD, CLS, SEP = 0, 2, 3
IDS, MASK, TYPES = (
    Input(name, torch.int64, ("batch", "sequence"))
    for name in ("input_ids", "attention_mask", "token_type_ids")
)


def sentence(number: int) -> str:
    """Of 1 to 25 words, no two alike."""
    return " ".join(
        WORDS[(number * 7 + i * (1 + number % 3)) % len(WORDS)] for i in range(1 + number * 11 % 25)
    )


def write_tokenizer(folder: Path, **options) -> Path:
    """A tokenizer of whole words, with [CLS] before and [SEP] behind a text."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    model.train_from_iterator([" ".join(WORDS)], tokenizers.trainers.WordLevelTrainer(special_tokens=special))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **(names | options))
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), model_max_length=64)


def lines(path: Path, count: int = 60, **fields) -> Path:
    made = [{"id": i, "sentence": sentence(i), "label": i % 2, **fields} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, made)) + "\n")
    return path


def opened(source, folder: Path | None, *inputs: Input, **options) -> Data:
    limit = options.pop("limit", 1024)
    return open_data(source, inputs or (IDS, MASK), text=Reading(folder, **options), limit=limit)


def bad(source, folder: Path | None, *inputs: Input, match: str, error=DataError, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        opened(source, folder, *inputs, **options)
    assert "\n" not in str(caught.value)


def real(data: Data) -> list[tuple[int, ...]]:
    """The tokens of every text, without padding, sorted."""
    return sorted(
        tuple(ids[mask == 1].tolist()) for batch in data for ids, mask in zip(*batch.inputs[:2], strict=True)
    )


# ---------------------------------------------------------------- files


def test_every_form_holds_the_same_texts(tmp_path, folder):
    made = [sentence(i) for i in range(20)]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "\r\n\r\n".join(made)).encode())
    lines(tmp_path / "b.jsonl", 20)
    for name, mark in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            rows = csv.writer(file, delimiter=mark)
            rows.writerows([("id", "sentence", "label"), *((i, text, i % 2) for i, text in enumerate(made))])
    forms = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv", "d.tsv")]
    found = [opened(path, folder) for path in forms]
    assert all(real(data) == real(found[0]) and data.samples == 20 for data in found)
    assert len(set(real(found[0]))) == 20 and all(ids[0] == CLS and ids[-1] == SEP for ids in real(found[0]))
    assert real(opened(forms[1:3], folder, text="sentence")) == sorted(real(found[0]) * 2)
    (tmp_path / "parts").mkdir()
    shutil.copy(forms[1], tmp_path / "parts")
    assert real(opened(tmp_path / "parts", folder)) == real(found[0])
    bad(
        tmp_path,
        folder,
        match=r"holds \.csv and \.jsonl and \.tsv and \.txt files; name those that are meant",
    )


def test_parquet(tmp_path, folder):
    arrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": ["the cat", None, "a dog"]}), path)
    data = opened(path, folder)
    assert data.samples == 2 and data.facts["empty_texts"] == 1 and data.facts["text_field"] == "text"
    path.write_bytes(path.read_bytes()[:50])
    bad(path, folder, match=r"x\.parquet: damaged, or not what its name says")


def test_parquet_needs_a_pyarrow_that_runs_no_code(tmp_path, folder, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    bad(path, folder, match=r"needs pyarrow: pip install 'compressor\[text\]'")
    old = type(sys)("pyarrow")
    old.__version__, old.parquet = "14.0.0", None
    monkeypatch.setitem(sys.modules, "pyarrow", old)
    bad(path, folder, match=r"pyarrow 14\.0\.0 is too old to be safe")


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.txt", b"", "of texts it has none"),
        ("a.txt", b"\n \n", "of texts it has none"),
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt, line 2: is not UTF-8 text; save the file as UTF-8"),
        ("a.txt", "the cat".encode("utf-16-le"), "line 1: is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: is no JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: holds a list, not an object like \{\"text\""),
        ("a.jsonl", b"[" * 100_000, "line 1: is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: there is no field 'text'; it has body"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "line 2: the field 'text' holds a list, not a text"),
        (
            "a.jsonl",
            b'{"one": "a", "two": "b"}\n',
            r"which field holds the texts\? It has one, two; name it: --text-",
        ),
        ("a.jsonl", b'{"text": "a", "sentence": "b"}\n', "which field holds the texts"),
        ("a.jsonl", b'{"id": 1}\n', "which field holds the texts"),
        ("a.csv", b"text\n", "of texts it has none"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", "line 3: has 3 fields, and the header has 2"),
        ("a.csv", b'text,id\n"a,1\nb,2\n', "line 3: unexpected end of data"),
        ("a.csv", b"text;id\na;1\n", "its fields are separated by ';'; a .csv has commas"),
        ("a.csv", b"text,text\na,b\n", "its header names 'text' twice"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(tmp_path, folder, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    bad(path, folder, match=match)


def test_other_wrong_files(tmp_path, folder, monkeypatch):
    bad(tmp_path / "none.txt", folder, match=r"none\.txt: no such file or folder")
    path = lines(tmp_path / "x.jsonl")
    bad(path, folder, match="line 1: there is no field 'body'; it has id, sentence, label", text="body")
    bad(path, folder, match="names one field, or two for pairs", error=UsageError, text="a,b,c")
    with pytest.raises(UsageError, match="holds texts; --preprocess is for images"):
        open_data(path, (IDS, MASK), preprocess="imagenet")
    monkeypatch.setattr("compressor.records._LONGEST", 10)
    bad(path, folder, match=r"line 1: is longer than")


def test_a_quotation_mark_between_tabs_is_a_letter(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tid\n"unclosed\t1\nplain\t2\n')
    assert [record["text"] for _, record in records(tmp_path / "a.tsv")] == ['"unclosed', "plain"]


def test_the_field_is_guessed_only_if_it_is_plain_and_that_is_said(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl", comment="of no interest")
    assert (
        opened(path, folder).facts["guessed"]
        == "the field 'sentence' of x.jsonl was taken for the text (--text-field)"
    )
    assert "guessed" not in opened(path, folder, text="sentence").facts
    (tmp_path / "y.csv").write_text("stars,review,label\n3,the cat,good\n")
    assert opened(tmp_path / "y.csv", folder).facts["text_field"] == "review"
    (tmp_path / "z.txt").write_text("the cat\n")
    assert "guessed" not in opened(tmp_path / "z.txt", folder).facts


# ---------------------------------------------------------------- batches


def test_batches_hold_texts_of_nearly_one_length_and_are_always_the_same(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl", 300)
    data = opened(path, folder)
    for batch in data:
        ids, mask = batch.inputs
        lengths = mask.sum(1)
        assert lengths.max() == ids.shape[1] <= 1.25 * lengths.min() and len(ids) <= texts.ROWS
        assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        assert bool((ids[mask == 0] == PAD).all())
    assert sum(data.sizes) == 300 and len(data) < 50
    padded = sum(float((batch.inputs[1] == 0).sum()) for batch in data)
    whole = sum(batch.inputs[1].numel() for batch in data)
    assert padded / whole < 0.05 and data.facts["padding"] == f"{padded / whole:.1%} of positions"
    for other in (data, opened(path, folder)):
        assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(data, other, strict=True))
    reseeded = opened(path, folder, seed=1)
    assert real(reseeded) == real(data) and not torch.equal(
        next(iter(reseeded)).inputs[0], next(iter(data)).inputs[0]
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_held_out_is_as_long_as_the_rest(tmp_path, folder, seed):
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(json.dumps({"text": "cat " * (1 + i // 16)}) for i in range(400)))
    statistics, held_out = split(opened(path, folder, seed=seed), seed=seed)
    assert not set(real(statistics)) & set(real(held_out)) or held_out.samples > 60
    means = [sum(map(len, real(part))) / part.samples for part in (statistics, held_out.limited(64))]
    assert abs(means[0] - means[1]) < 6  # of 3 to 27 tokens; the last 64 of the file would be 11 off
    assert statistics.samples + held_out.samples == 400


def test_padding_stands_where_the_tokenizer_puts_it(tmp_path):
    left = write_tokenizer(tmp_path / "left", padding_side="left", pad_token="[SEP]")
    data = opened(lines(tmp_path / "x.jsonl"), left)
    batch = next(batch for batch in data if not bool(batch.inputs[1].all()))
    ids, mask = batch.inputs
    assert (
        bool(mask[:, -1].all())
        and bool((mask.diff(dim=1) >= 0).all())
        and bool((ids[mask == 0] == SEP).all())
    )
    nothing = write_tokenizer(tmp_path / "none", pad_token=None)
    assert real(opened(tmp_path / "x.jsonl", nothing)) == real(data)


def test_pairs_and_token_types(tmp_path, folder):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"a": sentence(i), "b": sentence(i + 1), "n": i}) for i in range(20))
    )
    data = opened(path, folder, IDS, MASK, TYPES, text="a, b")
    assert data.facts["text_field"] == "a,b" and "segments" not in data.facts
    for batch in data:
        for ids, mask, types in zip(*batch.inputs, strict=True):
            first = ids.tolist().index(SEP) + 1
            assert types[:first].sum() == 0 and bool(types[first : int(mask.sum())].all())
            assert int((ids == SEP).sum()) == 2 and types[int(mask.sum()) :].sum() == 0
    bert = write_tokenizer(
        tmp_path / "bert", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    assert "the model takes no token_type_ids" in opened(path, bert, text="a,b").facts["segments"]
    assert real(opened(path, folder, text="a,b")) != real(opened(path, folder, text="a"))


def test_texts_are_cut_where_the_model_ends(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    whole = real(opened(path, folder))
    endless = write_tokenizer(tmp_path / "endless")
    short = write_tokenizer(tmp_path / "short", model_max_length=12)
    sentences = write_tokenizer(tmp_path / "sentences", model_max_length=64)
    (sentences / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert real(opened(path, endless)) == whole and "cut" not in opened(path, endless).facts
    for data in (opened(path, short), opened(path, endless, longest=12), opened(path, sentences)):
        assert real(data) == sorted((*ids[:11], SEP) if len(ids) > 12 else ids for ids in whole)
        assert data.facts["cut"].endswith("of 60 texts have 12 tokens or more, where they are cut")
    assert real(opened(path, short, longest=11)) == real(
        opened(path, short)
    )  # by one the tokenizer knows better
    assert real(opened(path, folder, longest=12)) == real(
        opened(path, short)
    )  # it promises more than there is


def test_no_text_is_longer_than_a_processor_bears(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST", 10)
    monkeypatch.setattr(texts, "_TOKENS", 40)
    data = opened(lines(tmp_path / "x.jsonl"), folder)
    assert max(batch.inputs[0].numel() for batch in data) == 40 and max(map(len, real(data))) == 10


def test_static_axes(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl", 61)
    static = [Input(spec.name, torch.int32, ("batch", 12)) for spec in (IDS, MASK)]
    data = opened(path, folder, *static)
    assert all(batch.inputs[0].shape[1] == 12 and batch.inputs[0].dtype == torch.int32 for batch in data)
    assert data.samples == 61 and data.facts["sequence"].startswith("texts are padded or cut to 12 tokens")
    fixed = [Input(spec.name, spec.dtype, (4, "sequence")) for spec in (IDS, MASK)]
    data = opened(path, folder, *fixed)
    assert set(data.sizes) == {4} and data.samples == 60 and data.facts["dropped_samples"] == 1
    assert any(
        max(map(len, real(data))) == len(ids) for ids in real(opened(path, folder))
    )  # not the longest went
    bad(
        lines(tmp_path / "y.jsonl", 3), folder, *fixed, match="it has only 3, and the model takes 4 at a time"
    )


def test_without_a_mask_texts_of_one_length_meet(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    with_mask, alone = opened(path, folder), opened(path, folder, IDS)
    found = sorted(tuple(ids.tolist()) for batch in alone for ids in batch.inputs[0])
    assert found == real(with_mask) and alone.facts["padding"] == "0.0% of positions"
    static = opened(path, folder, Input("input_ids", torch.int64, ("batch", 12)))
    assert (
        static.facts["unmasked"] == "the model takes no attention_mask: padding counts like any other token"
    )
    assert "unmasked" not in alone.facts


def test_masks_of_other_types_and_names_with_a_path(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    specs = [
        Input("batch.input_ids", torch.int64, ("batch", "s")),
        Input("batch.attention_mask", torch.float32, ("batch", "s")),
    ]
    data = opened(path, folder, *specs)
    assert next(iter(data)).inputs[1].dtype == torch.float32 and real(data) == real(opened(path, folder))


def test_the_first_texts_are_taken_and_only_so_many_are_read(tmp_path, folder, monkeypatch):
    path = lines(tmp_path / "x.jsonl")
    data = opened(path, folder, limit=10)
    assert data.samples == 10 and "first 10 samples" in data.description
    read: list[str] = []
    monkeypatch.setattr(
        texts, "records", lambda path: ((where, read.append(where) or one) for where, one in records(path))
    )
    assert real(opened(path, folder, limit=10)) == real(data) and len(read) == 10
    assert "first 60" not in opened(path, folder).description


def test_empty_texts_are_left_out_and_counted(tmp_path, folder):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": " "}\n{"text": null}\n{"text": "a"}\n')
    data = opened(path, folder)
    assert data.samples == 2 and data.facts["empty_texts"] == 2


# ---------------------------------------------------------------- tokenizers that do not serve


def test_inputs_that_no_tokenizer_makes(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    pixels = Input("pixel_values", torch.float32, ("batch", 3, 8, 8))
    bad(
        path,
        folder,
        IDS,
        MASK,
        pixels,
        match=r"no tokenizer makes the input pixel_values:f32\[batch,3,8,8\]; give its",
    )
    places = Input("position_ids", torch.int64, ("batch", "sequence"))
    bad(path, folder, IDS, MASK, places, match="no tokenizer makes the input position_ids")


def test_a_tokenizer_of_another_model(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    bad(
        path,
        folder,
        match=r"makes token 2\d for input 'input_ids', and the model has 10; they do not belong",
        tables={"input_ids": 10},
    )
    assert opened(path, folder, tables={"input_ids": 24}).samples == 60


def test_folders_without_a_tokenizer_or_with_a_broken_one(tmp_path, folder):
    path = lines(tmp_path / "x.jsonl")
    bad(path, None, match="the model came without a tokenizer; put its files .* or give token ids as .npz")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    bad(path, broken, match="broken: its tokenizer cannot be read", error=FileError)


def test_code_of_a_tokenizer_is_not_run(tmp_path, folder):
    mine = shutil.copytree(folder, tmp_path / "mine")
    (mine / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'fired')!r})\nclass Mine: pass\n")
    settings = json.loads((mine / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (mine / "tokenizer_config.json").write_text(json.dumps(settings))
    bad(
        lines(tmp_path / "x.jsonl"),
        mine,
        match="its tokenizer is code of its own, which is not run",
        error=FileError,
    )
    assert not (tmp_path / "fired").exists()


# ---------------------------------------------------------------- labels


def test_labels_are_numbers_or_names_of_classes(tmp_path, folder):
    path = tmp_path / "x.jsonl"
    values = [0, 1, "1", "good", 1.0, "bad"]
    path.write_text(
        "\n".join(json.dumps({"text": WORDS[i], "label": v, "topic": "x"}) for i, v in enumerate(values))
    )
    data = opened(path, folder, label="label", classes=("bad", "good"))
    first = {
        int(ids[1]): int(y) for batch in data for ids, y in zip(batch.inputs[0], batch.labels, strict=True)
    }
    order = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(WORDS[:6])
    assert [first[number] for number in order] == [0, 1, 1, 1, 1, 0]
    assert next(iter(opened(path, folder))).labels is None
    bad(path, folder, match=r"label 'topic' is 'x', no whole number from 0 on, and no class of the model \(bad, good\)",
        label="topic", classes=("bad", "good"), text="text")  # fmt: skip
    bad(
        path,
        folder,
        match=r"no label 'y'; it has text, label, topic\. Name it with --label-field",
        label="y",
        text="text",
    )
    for value in ("0.5", "-1", "true", "null", "[1]", "NaN", f"1{'0' * 30}", f"1{'0' * 400}"):
        path.write_text(f'{{"text": "a", "label": {value}}}\n')
        bad(
            path,
            folder,
            match="line 1: the label 'label' is '.{1,40}', no whole number from 0 on",
            label="label",
        )


# ---------------------------------------------------------------- the whole line


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label={0: "bad", 1: "good"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    folder = tmp_path_factory.mktemp("models") / "bert"
    model.save_pretrained(folder)
    return write_tokenizer(folder, model_max_length=32)


def test_the_command_line(tmp_path, bert, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "x.jsonl", 80)
    lines(tmp_path / "eval.jsonl", 20, verdict="good")
    code, _, err = run(
        bert, "--passes", "merge,int8", "--calib", "x.jsonl", "--text-field", "sentence", "--no-measure",
        "--eval", "eval.jsonl", "--label-field", "verdict", "-o", "out",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [spec["shape"] for spec in report["inputs"]] == [["batch", "sequence"]] * 2
    assert report["data"]["calibration"]["samples"] + report["data"]["held_out"]["samples"] == 80
    facts = report["data"]["facts"]
    assert (facts["text_field"], facts["tokenizer"], facts["tokens"]) == (
        "sentence",
        str(bert),
        "3 to 27 a text",
    )
    model = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    right = [
        int(model(**tokenizer(sentence(i), return_tensors="pt")).logits.argmax()) == 1 for i in range(20)
    ]
    assert report["rows"][0]["metric"]["top1"] == pytest.approx(sum(right) / 20)
    assert report["emitted"]["metric"]["top1"] == pytest.approx(sum(right) / 20, abs=0.11)
    code, _, err = run(
        "verify", bert, tmp_path / "out" / "model.onnx", "--data", "x.jsonl", "--text-field", "sentence"
    )
    assert code == 0, err
    code, _, err = run(
        "verify", bert, tmp_path / "out" / "model.onnx", "--data", "x.jsonl", "--text-field", "body"
    )
    assert (
        code == 4 and err == "error: x.jsonl, line 1: there is no field 'body'; it has id, sentence, label\n"
    )


def test_what_pads_the_texts_makes_no_difference(tmp_path, bert):
    """Another token in all padded positions: the same ranges to the bit, and so the same model."""
    from compressor import api

    path = lines(tmp_path / "x.jsonl", 80)
    other = shutil.copytree(bert, tmp_path / "bert")
    write_tokenizer(other, model_max_length=32, pad_token="dog")
    options = {
        "calibration": path,
        "passes": "int8",
        "stop_after": "int8",
        "text_field": "sentence",
        "measure": False,
    }
    made = [api.compress(model, output=tmp_path / "out", **options) for model in (bert, other)]
    assert made[0].graph.fingerprint() == made[1].graph.fingerprint()
    shorter = api.compress(bert, output=tmp_path / "out", calib_limit=40, **options)
    assert shorter.graph.fingerprint() != made[0].graph.fingerprint()


def test_a_fixed_sequence_is_evaluated_on_texts_cut_to_it(tmp_path, bert, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "x.jsonl", 30)
    words = (bert, "--calib", "x.jsonl", "--eval", "x.jsonl", "--no-measure", "-o", "out", "--passes", "fold")
    code, _, err = run(*words, "--static", "--target", "mobile")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= report["emitted"]["metric"]["top1"] <= 1
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    assert [spec["shape"] for spec in signature["inputs"]] == [[1, 16], [1, 16]]
    assert report["data"]["facts"]["sequence"].startswith("texts are padded or cut to 16 tokens")
    (tmp_path / "short.txt").write_text("the cat\n" * 9)
    assert run("verify", bert, tmp_path / "out" / "model.onnx", "--data", "short.txt")[0] == 0


def test_generated_masks_stay_masks(tmp_path):
    """OPT counts its positions from the mask, whose values therefore index no table themselves."""
    from compressor.capture import capture
    from compressor.data import synthetic, table_sizes
    from compressor.export import quiet

    config = transformers.OPTConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        word_embed_proj_dim=16, max_position_embeddings=20, use_cache=False,
    )  # fmt: skip
    with quiet():
        graph = capture(transformers.OPTModel(config).eval(), inputs=[IDS, MASK])
    assert table_sizes(graph) == {"input_ids": 24}
    data = synthetic(graph.inputs, graph.example, table_sizes=table_sizes(graph))
    for batch in data:
        assert bool((batch.inputs[1] == 1).all()) and not bool((batch.inputs[0] <= 1).all())
