"""The paper's numbers, typed a second time by other routes: row sums, printed gains, Delta rows, captions.

The sums were added up from the printed cells, not from `paper.py`; gains are those which the paper's tables and text
print. A slip in one cell of `paper.py` breaks its row's sum.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from crossdino.benchmarks import BENCHMARKS
from crossdino.paper import PAPER, PaperRow, paper_rows, recipe_benchmark

# Table -> sum of the metrics of each row that is ours or DINO's, in the order of the table. Table I repeats its first
# DINO row further down, which is one entry here.
SUMS = {
    "I": [316.4, 324.4, 325.3, 328.5, 331.2, 331.2, 338.4, 352.2, 334.2, 342.1, 352.4],
    "II": [231.91, 232.87, 231.27, 231.46, 230.82, 230.48],
    "III": [165.0, 171.3, 176.3, 187.0],
    "IV": [156.8, 162.6, 153.4, 171.3],
    "V": [219.2, 252.5],
    "VI": [316.4, 321.6, 320.3, 324.0, 331.2, 336.0, 335.9, 338.4, 334.2, 339.8, 341.5, 342.1],
    "VII": [165.0, 176.3, 178.3, 187.0],
    "VIII": [316.4, 317.1, 318.6, 321.6],
    "X": [178.3, 185.5, 187.0, 187.2],
    "XI": [165.0, 170.3, 165.1, 171.3, 178.3, 185.5],
}

# (table, recipe, other recipe) -> gains as printed in tables or text, metric by metric.
GAINS: list[tuple[str, str, str, dict[str, float]]] = [
    ("I", "cross_dino_r50", "dino_r50", {"AP": 1.1, "AP_S": 1.1}),
    ("I", "cross_dino_r50_24ep", "dino_r50_24ep", {"AP": 1.0, "AP_S": 0.8}),
    ("I", "cross_dino_swin_t", "dino_swin_t", {"AP": 0.8, "AP_S": 2.4}),
    ("I", "dino_clap_strip_t", "dino_r50", {"AP": 2.7, "AP_S": 3.0}),
    ("I", "cross_dino_clap_strip_t", "dino_r50", {"AP": 3.6, "AP_S": 4.4}),
    ("I", "cross_dino_clap_strip_t", "dino_clap_strip_t", {"AP": 0.9}),
    ("II", "widerperson_cross_dino_r50", "widerperson_dino_r50", {"AP": 0.54}),
    ("II", "widerperson_cross_dino_swin_t", "widerperson_dino_swin_t", {"AP": 0.86, "Recall": 0.23}),
    ("II", "widerperson_cross_dino_clap_strip_t", "widerperson_dino_clap_strip_t", {"AP": 0.73}),
    ("II", "widerperson_cross_dino_clap_strip_t", "widerperson_dino_r50", {"AP": 1.17, "mMR": -3.17}),
    ("III", "visdrone_cross_dino_r50", "visdrone_dino_r50", {"AP": 1.4}),
    ("III", "visdrone_dino_clap_strip_t", "visdrone_dino_r50", {"AP": 1.9, "AP_vt": 0.6}),
    ("III", "visdrone_cross_dino_clap_strip_t", "visdrone_dino_r50",
     {"AP": 3.7, "AP50": 5.7, "AP75": 4.0, "AP_vt": 2.3, "AP_t": 2.2, "AP_s": 4.1}),
    ("IV", "aitod_cross_dino_r50", "aitod_dino_r50", {"AP": 0.8}),
    ("V", "sodad_cross_dino_clap_strip_t", "sodad_dino_r50",
     {"AP": 4.3, "AP50": 7.5, "AP75": 4.1, "AP_eS": 3.3, "AP_rS": 4.7, "AP_gS": 4.4, "AP_N": 5.0}),
    ("VI", "table6_clap_strip_t_cctm", "dino_clap_strip_t", {"AP_S": 0.7}),
    ("VI", "table6_clap_strip_t_boost", "dino_clap_strip_t", {"AP": 0.9, "AP_S": 1.2}),
    ("VI", "cross_dino_clap_strip_t", "dino_clap_strip_t", {"AP": 0.9, "AP_S": 1.4}),
    ("VI", "table6_r50_boost", "dino_r50", {"AP": 0.6, "AP_S": 0.2}),
    ("VII", "visdrone_cross_dino_clap_strip_t", "visdrone_dino_r50", {"AP": 3.7, "AP_vt": 2.3}),
    ("X", "table10_beta_005", "visdrone_cross_dino_clap_strip_t_focal", {"AP": 1.4}),
    ("X", "table10_beta_025", "visdrone_cross_dino_clap_strip_t_focal", {"AP": 2.0}),
    ("XI", "visdrone_dino_r50_boost", "visdrone_dino_r50", {"AP": 1.1}),
    ("XI", "visdrone_cross_dino_r50", "visdrone_cross_dino_r50_focal", {"AP": 1.0}),
    ("XI", "table10_beta_005", "visdrone_cross_dino_clap_strip_t_focal", {"AP": 1.4}),
]  # fmt: skip


def row_of(table: str, recipe: str) -> PaperRow:
    (row,) = [row for row in PAPER if row.table == table and row.recipe == recipe]
    return row


@pytest.mark.parametrize("table", SUMS)
def test_the_cells_of_every_row_add_up(table: str) -> None:
    assert [round(sum(row.metrics.values()), 2) for row in PAPER if row.table == table] == SUMS[table]


def test_there_are_no_other_rows() -> None:
    assert {row.table for row in PAPER} == set(SUMS)
    assert len(PAPER) == sum(len(sums) for sums in SUMS.values()) == 57


@pytest.mark.parametrize(("table", "recipe", "other", "gains"), GAINS)
def test_the_gains_that_the_paper_prints(table: str, recipe: str, other: str, gains: dict[str, float]) -> None:
    ours, theirs = row_of(table, recipe).metrics, row_of(table, other).metrics
    # A hundredth is the last printed digit of the widest table.
    assert {name: round(ours[name] - theirs[name], 2) for name in gains} == gains


def test_the_sentences_of_the_abstract_and_of_the_data_sets() -> None:
    assert row_of("I", "cross_dino_clap_strip_t").metrics["AP_S"] == 36.4
    assert row_of("I", "cross_dino_clap_strip_t").parameters_millions == 45
    assert row_of("II", "widerperson_cross_dino_swin_t").metrics["AP"] == 93.93
    assert row_of("II", "widerperson_cross_dino_swin_t").metrics["Recall"] == 99.65
    assert row_of("II", "widerperson_cross_dino_clap_strip_t").metrics["mMR"] == 36.91
    assert row_of("IV", "aitod_cross_dino_clap_strip_t").metrics["AP"] == 22.6
    assert row_of("IV", "aitod_cross_dino_clap_strip_t_1200").metrics["AP"] == 25.1
    assert row_of("X", "table10_beta_025").metrics["AP"] == 35.8
    assert row_of("X", "table10_beta_005").metrics["AP"] == 35.2


# Model and backbone -> millions of parameters, GFLOPs: the last two columns of Table I.
SIZES = {
    ("dino", "ResNet50"): (47, 279),
    ("dino", "Swin-T"): (48, 280),
    ("dino", "CLAP-Strip-T"): (44, 263),
    ("cross", "ResNet50"): (48, 288),
    ("cross", "Swin-T"): (49, 302),
    ("cross", "CLAP-Strip-T"): (45, 277),
}


def test_sizes_stand_in_table_i_alone() -> None:
    for row in PAPER:
        size = (row.parameters_millions, row.gflops)
        assert size == (SIZES[row.recipe.partition("_")[0], row.backbone] if row.table == "I" else (None, None)), row


def test_beta_is_that_of_the_captions() -> None:
    for row in PAPER:
        if row.beta is None:
            assert not ("Boost" in row.model or row.model.startswith("Cross") and "Focal" not in row.model), row
        elif row.table == "IV":
            assert row.beta == 0.05
        elif row.table in ("III", "V", "VII"):
            assert row.beta == 0.1
        elif row.table in ("I", "VI"):
            assert row.beta == (0.1 if row.backbone == "Swin-T" else 1.0)
        elif row.table == "II":
            assert row.beta == 1.0
    assert [row.beta for row in PAPER if row.table == "X"] == [None, 0.05, 0.1, 0.25]


def test_a_recipe_means_one_model_and_contradictions_are_noted() -> None:
    by_recipe: dict[str, list[PaperRow]] = defaultdict(list)
    for row in PAPER:
        by_recipe[row.recipe].append(row)
    contradicting = {name for name, rows in by_recipe.items() if len({str(row.metrics) for row in rows}) > 1}
    assert contradicting == {"cross_dino_r50"}  # Table I: 50.1, Table VI: 50.0
    assert all("other numbers" in row.note for row in by_recipe["cross_dino_r50"])
    for name, rows in by_recipe.items():
        assert len({(row.benchmark, row.backbone, row.epochs, row.beta) for row in rows}) == 1, name
        assert len({row.table for row in rows}) == len(rows), name


def test_rows_of_a_recipe() -> None:
    assert [row.table for row in paper_rows("dino_r50")] == ["I", "VI", "VIII"]
    assert [row.table for row in paper_rows("visdrone_cross_dino_clap_strip_t")] == ["III", "VII", "X"]
    assert paper_rows("compact") == () and paper_rows("nothing") == ()
    assert recipe_benchmark("sodad_dino_r50") == "sodad" and recipe_benchmark("compact") is None
    assert {row.benchmark: row.split for row in PAPER} == {
        "coco": "val2017",
        "widerperson": "val",
        "visdrone": "test-dev",
        "aitod": "test",
        "sodad": "test",
    }


def test_metrics_are_named_as_the_size_bands_of_the_benchmark() -> None:
    for row in PAPER:
        bands = [name.removeprefix("AP_") for name in row.metrics if name.startswith("AP_")]
        assert set(bands) <= set(BENCHMARKS[row.benchmark].size_bands), row
        # Larger objects are easier in every table, and a lower threshold is: two cells that changed places show.
        by_size = [row.metrics[f"AP_{band}"] for band in bands]
        assert by_size == sorted(by_size), row
        assert row.metrics.get("AP75", 0) < row.metrics["AP"] + 6 and row.metrics["AP"] < row.metrics.get("AP50", 100)
        assert all(0 < value < 100 for value in row.metrics.values())
