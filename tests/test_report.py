"""`crossdino report`: what is read from runs, when they are compared with the paper, and the four layouts."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crossdino.cli import main
from crossdino.complexity import measure
from crossdino.config import Config, with_changes, write_yaml
from crossdino.errors import InputError
from crossdino.paper import paper_rows
from crossdino.recipes import RECIPES
from crossdino.report import VALIDATION, chosen_metrics, costs, read_run
from crossdino.report_tables import latex, lay_out, markdown, terminal_tables, tidy_csv

AITOD = {"AP": 0.2345, "AP50": 0.5789, "AP75": 0.15, "AP_vt": 0.1, "AP_t": 0.2, "AP_s": 0.3, "AP_m": None,
         "AR@100": 0.4, "oLRP": 0.8}  # fmt: skip


def evaluation(path: Path, metrics: dict[str, Any] | None = None, protocol: str = "aitod", **provenance: Any) -> Path:
    """A file as `crossdino evaluate --protocol ... --json` writes it; None takes a key out of the provenance."""
    origin = {
        "crossdino": "0.1.0",
        "git": "abcdef0123456789",
        "git_dirty": False,
        "benchmark": protocol,
        "split": "test",
        "recipe": "aitod_dino_r50",
        "epochs": 12,
        "short_side": 800,
        "long_side": 800,
        "num_select": 900,
        "tile_size": 0,
        "training_git": None,
        **provenance,
    }
    content = {
        "protocol": protocol,
        "metrics": AITOD if metrics is None else metrics,
        "by_class": {},
        "num_images": 3,
        "num_objects": 4,
        "num_predictions": 5,
        "settings": {"max_detections": [100, 300, 1500]},
        "warnings": [],
        "provenance": origin,
    }
    path.write_text(json.dumps(content))
    return path


def training(folder: Path, config: Config) -> Path:
    """A training's folder with two evaluations, the first of them the best."""
    folder.mkdir()
    write_yaml(config, folder / "config.yaml")
    numbers = {"ap50": 0.5, "ap75": 0.1}
    records = [
        {"kind": "train", "step": 1, "epoch": 0, "loss": 3.0},
        {"kind": "eval", "step": 1, "epoch": 1, "ap": 0.31, **numbers, "by_size": {"tiny": 0.2}, "best": True},
        {"kind": "eval", "step": 2, "epoch": 2, "ap": 0.30, **numbers, "by_size": {"tiny": None}, "best": False},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "ev')
    (folder / "provenance.json").write_text(json.dumps({"git": "fedcba9876543210", "git_dirty": True}))
    return folder


def test_a_run_on_the_papers_split_is_compared(tmp_path):
    (run,) = read_run(evaluation(tmp_path / "a.json", git_dirty=True, training_git="1111111222"))
    (paper,) = paper_rows("aitod_dino_r50")
    assert (run.name, run.backbone, run.epochs, run.split) == ("aitod_dino_r50", "ResNet50", 12, "test")
    assert (run.input_px, run.num_select, run.max_detections) == ((800, 800), 900, (100, 300, 1500))
    assert (run.revision, run.training_revision) == ("abcdef0+", "1111111")
    assert run.comparable
    # Table IV: 23.1
    assert run.paper is paper
    assert run.difference("AP") == pytest.approx(23.45 - 23.1)
    assert run.difference("AP_vt") == pytest.approx(10.0 - 10.5)
    assert run.difference("AR@100") is None  # not printed in the paper
    assert "AP_m" not in run.metrics


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "trainval"}, "measured on split trainval, the paper says test"),
        ({"split": None}, "does not say which data set and split"),
        ({"benchmark": "visdrone"}, "measured on visdrone, the paper's row is of aitod"),
        ({"protocol": "coco", "benchmark": "aitod"}, "measured by protocol coco, the paper's is aitod"),
        ({"short_side": 1200, "long_side": 1200}, "input 1200 x 1200 px, the recipe's is 800 x 800"),
    ],
)
def test_what_stands_in_the_way_is_said(tmp_path, changes, reason):
    (run,) = read_run(evaluation(tmp_path / "a.json", **changes))
    assert not run.comparable
    assert run.difference("AP") is None
    assert any(note.startswith("no difference to the paper") and reason in note for note in run.notes)


def test_visdrone_val_is_not_test_dev(tmp_path):
    settings = {"recipe": "visdrone_dino_r50", "short_side": 1280, "long_side": 1280}
    (val,) = read_run(evaluation(tmp_path / "val.json", protocol="visdrone", split="val", **settings))
    (dev,) = read_run(evaluation(tmp_path / "dev.json", protocol="visdrone", split="test-dev", **settings))
    assert val.difference("AP") is None
    assert "measured on split val, the paper says test-dev" in " ".join(val.notes)
    assert dev.difference("AP") == pytest.approx(23.45 - 31.7)


def test_other_epochs_and_contradicting_tables_are_footnotes(tmp_path):
    numbers = {"AP": 0.5, "AP_S": 0.3}
    path = evaluation(
        tmp_path / "a.json", numbers, "coco", split="val2017", recipe="cross_dino_r50", epochs=3, long_side=1333
    )
    (run,) = read_run(path)
    assert run.difference("AP") == pytest.approx(50.0 - 50.1)
    assert "trained 3 epochs, the paper 12" in run.notes
    # Table VI: 50.0 and 32.6 for what Table I gives 50.1 and 33.1
    assert any("Table VI" in note and "AP 50" in note and "AP_S 32.6" in note for note in run.notes)


def test_a_renamed_run_stays_beside_its_row_of_the_paper(tmp_path):
    (run,) = read_run(evaluation(tmp_path / "a.json", name="second try"))
    assert (run.name, run.recipe, run.backbone) == ("second try", "aitod_dino_r50", "ResNet50")
    assert run.difference("AP") == pytest.approx(23.45 - 23.1)
    renamed = dataclasses.replace(RECIPES["aitod_dino_r50"](), name="second try")
    folder = training(tmp_path / "run", renamed)
    assert read_run(folder)[0].paper is None  # nothing tells
    (folder / "provenance.json").write_text(json.dumps({"git": "fedcba9", "recipe": "aitod_dino_r50"}))
    (own,) = read_run(folder)
    assert (own.name, own.recipe) == ("second try", "aitod_dino_r50")
    assert own.paper == paper_rows("aitod_dino_r50")[0] and own.config == renamed
    # Its evaluation has the training's own settings, not the recipe's.
    evaluation(folder / "test.json", name="second try")
    write_yaml(with_changes(renamed, {"loss.alpha": 0.5}), folder / "config.yaml")
    (measured,) = read_run(folder)
    assert any("loss.alpha 0.5 (0.25)" in note for note in measured.notes)


@pytest.mark.parametrize("width", [60, 80, 100, 140, 240])
def test_every_name_and_number_stands_on_a_narrow_terminal(tmp_path, width):
    recipe = "visdrone_cross_dino_clap_strip_t_focal"
    runs = [
        *read_run(evaluation(tmp_path / "a.json", AITOD, protocol="visdrone", recipe=recipe)),
        *read_run(evaluation(tmp_path / "b.json", AITOD, protocol="visdrone", recipe="visdrone_dino_r50")),
    ]
    layout = lay_out(runs, [*AITOD], {run.source: (47.5, 1234.0) for run in runs})
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*terminal_tables(layout, width), sep="\n")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    # Names may be folded, but not away; no number and no header is.
    columns = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert recipe in "".join(columns)
    for cell in ("23.4", "57.9", "33.8", "1234", "47.5", *AITOD, "GFLOPs", "Params (M)", "Epochs"):
        assert re.search(rf"(?<![\w.]){re.escape(cell)}(?![\w.])", text), cell


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    files = [evaluation(tmp_path / place) for place in ("first/test.json", "second/test.json")]
    other = evaluation(tmp_path / "other.json", recipe="aitod_cross_dino_r50")
    runs = [run for path in (*files, other) for run in read_run(path)]
    assert [rows[0][0].text for rows in lay_out(runs, ["AP"], {}).groups] == [
        "aitod_dino_r50 (first/test)",
        "aitod_dino_r50 (second/test)",
        "aitod_cross_dino_r50",
    ]
    # The same file twice is one run.
    assert main(["report", str(other), str(other), str(tmp_path / "first" / ".." / "other.json"), "--no-costs"]) == 0
    assert capsys.readouterr().out.count("│ aitod_cross_dino_r50") == 2  # in the two parts of the table


def test_a_recipe_of_ours_has_no_paper(tmp_path):
    (run,) = read_run(evaluation(tmp_path / "a.json", recipe="compact"))
    (unknown,) = read_run(evaluation(tmp_path / "mine.json", recipe=None))
    assert run.paper is None
    assert run.notes == ()
    assert (unknown.name, unknown.backbone, unknown.paper) == ("mine", None, None)


def test_a_training_stands_for_itself_if_nothing_else_was_measured(tmp_path):
    config = with_changes(RECIPES["visdrone_dino_r50"](), {"data.val_annotations": "some/where/val.json"})
    folder = training(tmp_path / "run", config)
    (run,) = read_run(folder)
    assert run.protocol == VALIDATION
    assert run.metrics == {"AP": 0.31, "AP50": 0.5, "AP75": 0.1, "AP_tiny": 0.2}
    assert (run.epochs, run.input_px, run.num_select, run.max_detections) == (1, (1280, 1280), 900, (1500,))
    assert run.revision == "fedcba9+"
    assert run.difference("AP") is None
    assert any("on val.json, on which the epoch (1) was chosen too" in note for note in run.notes)
    # An evaluation in the folder counts instead; other JSON files are not looked at.
    (folder / "detections.json").write_text("[]")
    evaluation(folder / "val.json", protocol="visdrone", recipe=None, split="val", training_git="fedcba9876")
    evaluation(folder / "dev.json", protocol="visdrone", recipe=None, split="test-dev", short_side=1280, long_side=1280)
    dev, val = read_run(folder)
    assert (dev.name, dev.split, val.split) == ("visdrone_dino_r50", "test-dev", "val")
    assert dev.comparable
    assert not val.comparable


def test_settings_that_are_not_the_recipes_are_told(tmp_path):
    changes = {"training.batch_size": 2, "loss.beta": 0.5, "data.source": "elsewhere", "training.seed": 7}
    folder = training(tmp_path / "run", with_changes(RECIPES["aitod_cross_dino_r50"](), changes))
    (run,) = read_run(folder)
    wanted = RECIPES["aitod_cross_dino_r50"]()
    (note,) = (note for note in run.notes if "not the recipe's" in note)
    assert f"loss.beta 0.5 ({wanted.loss.beta})" in note
    assert "seed" not in note
    assert "source" not in note


def test_an_evaluation_without_a_protocol(tmp_path):
    content = {
        "ap": 0.2,
        "ap50": 0.4,
        "ap75": 0.1,
        "ar": 0.3,
        "by_size": {"small": {"ap": 0.1, "ap50": 0.2, "ar": 0.1, "num_objects": 3}, "large": {"ap": None}},
        "settings": {"max_detections": 100},
    }
    (tmp_path / "old.json").write_text(json.dumps(content))
    (run,) = read_run(tmp_path / "old.json")
    assert run.metrics == {"AP": 0.2, "AP50": 0.4, "AP75": 0.1, "AP_small": 0.1, "AR@100": 0.3}
    assert "does not say where its numbers come from" in run.notes[0]
    content["provenance"] = {"recipe": "dino_r50", "benchmark": "coco", "split": "val2017"}
    (tmp_path / "new.json").write_text(json.dumps(content))
    (run,) = read_run(tmp_path / "new.json")
    assert "measured without --protocol coco" in " ".join(run.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dets.json", [], "is a list, such as detections are"),
        ("truth.json", {"annotations": [], "images": []}, "is a COCO data set"),
        ("compared.json", {"names": ["a"], "metrics": {}, "settings": {}}, "written by `crossdino compare`"),
        ("any.json", {"hello": 1}, "is no file of `crossdino evaluate --json`"),
        ("missing.json", None, "is not there"),
    ],
)
def test_files_that_are_no_evaluations(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(message)):
        read_run(tmp_path / name)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="holds neither"):
        read_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a model folder"):
        read_run(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_run(tmp_path / "broken.json")
    begun = training(tmp_path / "begun", RECIPES["compact"]())
    (begun / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="has not measured anything yet"):
        read_run(begun)


def test_best_numbers_are_bold_among_those_that_can_be_compared(tmp_path):
    better = {**AITOD, "AP": 0.25, "oLRP": 0.9, "AP50": 0.57894}
    runs = [
        *read_run(evaluation(tmp_path / "a.json")),
        *read_run(evaluation(tmp_path / "b.json", better, recipe="aitod_cross_dino_r50")),
        *read_run(evaluation(tmp_path / "c.json", {**AITOD, "AP": 0.9}, split="trainval")),
    ]
    groups = lay_out(runs, ["AP", "AP50", "oLRP"], {}).groups
    bold = [[cell.text for cell in rows[0] if cell.bold] for rows in groups]
    # 57.89 and 57.894 are printed alike; of oLRP the lower one is the better one; c is alone on its split.
    assert bold == [["57.9", "80.0"], ["25.0", "57.9"], []]


def rows_of_markdown(text: str) -> list[list[str]]:
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells]


def test_markdown(tmp_path):
    (run,) = read_run(evaluation(tmp_path / "a.json"))
    runs = [dataclasses.replace(run, name="my|model_*1*", notes=("a | b",)), run]
    text = markdown(lay_out(runs, ["AP", "AP_vt"], {}))
    header, rule, first, paper, difference, second, *_ = rows_of_markdown(text)
    assert header[:5] == ["Model", "Backbone", "Epochs", "AP", r"AP\_vt"]
    assert "GFLOPs" not in header  # nobody knows one
    assert {len(row) for row in (rule, first, paper, difference, second)} == {len(header)}
    assert first[0] == r"my\|model\_\*1\* <sup>1</sup>"
    assert first[3] == second[3] == "**23.4**"  # 23.45 is 23.4 as Python rounds, half to even
    assert paper[:5] == ["paper, Table IV: DINO-R50", "ResNet50", "12", "23.1", "10.5"]
    assert difference[3:5] == ["+0.3", "-0.5"]
    assert second[header.index("Split")] == "aitod test"
    assert second[header.index("Input")] == "800 x 800"
    assert second[header.index("Select / caps")] == "900 / 100, 300, 1500"
    assert second[header.index("Revision")] == "abcdef0"
    assert text.endswith("1. a \\| b\n")


def test_latex(tmp_path):
    (run,) = read_run(evaluation(tmp_path / "a.json"))
    text = latex(lay_out([dataclasses.replace(run, name="a_b & 50 % #1 {x} ~^\\", notes=("50 % of it",)), run], ["AP", "AP_vt"], {}))  # fmt: skip  # noqa: E501
    begin, _, header, *_ = text.splitlines()
    columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", begin)
    assert columns is not None
    body = [line for line in text.splitlines() if line.endswith(r" \\") and "&" in line]
    assert len(body) == 7
    for line in body:
        assert len(re.split(r"(?<!\\)&", line)) == len(columns[1])
    assert r"AP\_vt" in header
    assert r"a\_b \& 50 \% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}$^{1}$" in text
    assert r"\textbf{23.4}" in text
    assert "$-$0.5" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"$^{1}$ 50 \% of it" in text


def test_csv_is_tidy_and_exact(tmp_path):
    runs = [*read_run(evaluation(tmp_path / "a.json")), *read_run(evaluation(tmp_path / "b.json", split="trainval"))]
    rows = list(csv.DictReader(io.StringIO(tidy_csv(runs, ["AP", "AR@100"], {runs[0].source: (46.8, 177.9)}))))
    assert [(Path(row["run"]).name, row["metric"]) for row in rows] == [
        (name, metric) for name in ("a.json", "b.json") for metric in ("AP", "AR@100")
    ]
    assert float(rows[0]["ours"]) == 100 * 0.2345
    assert float(rows[0]["paper"]) == 23.1
    assert float(rows[0]["difference"]) == pytest.approx(0.35)
    assert (rows[0]["gflops"], rows[2]["gflops"]) == ("177.9", "")
    assert rows[1]["paper"] == rows[1]["difference"] == rows[2]["difference"] == ""
    assert rows[0]["max_detections"] == "100 300 1500"
    assert "measured on split trainval" in rows[2]["notes"]


def test_widerperson_has_two_digits_and_a_lower_miss_rate_is_better(tmp_path):
    numbers = {"AP": 0.93456, "Recall": 0.99, "mMR": 0.38}
    settings = {"split": "val", "recipe": "widerperson_dino_r50", "short_side": 800, "long_side": 1333, "epochs": 24}
    config = RECIPES["widerperson_dino_r50"]().data
    settings |= {"short_side": config.test_short_side, "long_side": config.test_long_side}
    runs = read_run(evaluation(tmp_path / "a.json", numbers, "widerperson", **settings))
    runs += read_run(evaluation(tmp_path / "b.json", {**numbers, "mMR": 0.4}, "widerperson", **settings))
    assert chosen_metrics(runs, None) == ["AP", "Recall", "mMR"]
    header, _, first, paper, difference, second, *_ = rows_of_markdown(markdown(lay_out(runs, ["AP", "mMR"], {})))
    assert first[3:5] == ["**93.46**", "**38.00**"]
    assert second[4] == "40.00"
    assert paper[3:5] == ["92.75", "40.08"]
    assert difference[3:5] == ["+0.71", "-2.08"]


def test_metrics_are_chosen(tmp_path):
    runs = read_run(evaluation(tmp_path / "a.json"))
    assert chosen_metrics(runs, None) == ["AP", "AP50", "AP75", "AP_vt", "AP_t", "AP_s"]
    assert chosen_metrics(runs, ["oLRP", "AP"]) == ["oLRP", "AP"]
    with pytest.raises(InputError, match="no run has the metric 'AP_xl'"):
        chosen_metrics(runs, ["AP_xl"])


def test_costs_are_those_of_the_runs_model(tmp_path):
    small = {"model.backbone": "test_efficientnet", "model.hidden_dim": 32, "model.num_heads": 2}
    config = with_changes(RECIPES["compact"](), small)
    (run,) = read_run(training(tmp_path / "run", config))
    cost = measure(config.model, (config.data.test_short_side, config.data.test_long_side))
    assert costs(run) == (cost.num_parameters / 1e6, cost.num_multiply_adds / 1e9)
    assert costs(dataclasses.replace(run, config=None)) is None


@pytest.mark.parametrize(("name", "begins"), [("r.md", "| Model"), ("r.tex", "\\begin{tab"), ("r.csv", "run,model"),
                                              ("r.txt", "┏")])  # fmt: skip
def test_command_line(tmp_path, capsys, name, begins):
    one, two = evaluation(tmp_path / "a.json"), evaluation(tmp_path / "b.json", split="trainval")
    assert main(["report", str(one), str(two), "--no-costs"]) == 0
    printed = capsys.readouterr().out
    assert "paper, Table IV: DINO-R50" in printed
    assert "+0.3" in printed
    assert "[1] no difference to the paper: measured on split trainval, the paper says test" in printed
    assert "AP_vt" in printed
    assert "900 / 100, 300, 1500" in printed
    words = ("--no-costs", "--output", str(tmp_path / name), "--metrics", "AP,oLRP")
    assert main(["report", str(one), str(two), *words]) == 0
    assert capsys.readouterr().out == ""
    written = (tmp_path / name).read_text()
    assert written.startswith(begins)
    assert "AP_vt" not in written
    assert "oLRP" in written


def test_mistakes_are_one_line(tmp_path, capsys):
    path = evaluation(tmp_path / "a.json")
    for words in (["report"], ["report", str(path), "--metrics", "x"], ["report", str(path), "--output", str(path)],
                  ["report", str(tmp_path / "none")]):  # fmt: skip
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
