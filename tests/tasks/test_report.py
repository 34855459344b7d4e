"""The report as a reader, a parser and an attacker see it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks.comparison import DIMENSIONS, Benchmark, ModelSamples, compare
from tasks.report import (
    Interference,
    LayerDiagnostics,
    ReportInputs,
    leaderboard_markdown,
    leaderboard_rows,
    results,
    write_report,
)
from tasks.report.layers import decision_lines, interference_maps, locate
from tasks.report.template import figure_json
from tasks.report.trade_off import pair_front

HOSTILE = '</script><b onclick="x()">&|`var(--ink)'
SUITE = (
    Benchmark("ifeval", "helpful"),
    Benchmark("truth", "honest"),
    Benchmark("toxic", "harmless", weight=2.0, higher_is_better=False),
)
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight")


def samples(name, role, level, **rest):
    values = {b.task: {str(i): float(i % 10 < level + k) for i in range(40)} for k, b in enumerate(SUITE)}
    fields = {"specialty": None, "settings": {}, "validation": {}} | rest
    return ModelSamples(name=name, role=role, digest=f"digest of {name}", values=values, **fields)


def comparison(name="r_tsvm", suite="3h"):
    models = [
        samples("base", "base", 2),
        *(samples(d, "expert", 4, specialty=d, validation={"mean": 0.5, "helpful": 0.4}) for d in DIMENSIONS),
        samples("mixture", "mixture", 5),
        samples(name, "merged", 6, settings={"method": name, "scale": 0.8, "scope": name}),
        samples("limited", "merged", 1, partial=True),
    ]
    return compare(models, SUITE, suite=suite, num_resamples=200)


def inputs(text=None):
    """Full inputs; ``text`` stands wherever a user can put a name of their own."""
    name, other = text or "r_tsvm", text or "other"
    return ReportInputs(
        title=text or "Balance",
        comparison=comparison(name, other),
        interference=Interference(
            tensors=(*TENSORS, other),
            pairs=("helpful · honest", other),
            cosine=((0.1, None), (-0.3, 0.2), (0.0, 0.5), (0.2, 0.2)),
            overall=(0.05, None),
        ),
        diagnostics={
            name: tuple(
                LayerDiagnostics(t, ranks={"helpful": 3, other: 5}, weights={"helpful": 1.25, other: 0.75})
                for t in (*TENSORS[1:], other)
            )
        },
        recipes={name: f"base: {other}\n"},
        provenance={other: other},
        created="2026-08-24T12:00:00+00:00",
    )


class Page(HTMLParser):
    """Elements with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.scripts, self._open = [], "", {}, None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs).get("id", str(len(self.scripts)))) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is None:
            self.text += data
        elif self._open[0] == "script":
            self.scripts[self._open[1]] = self.scripts.get(self._open[1], "") + data

    def all(self, tag=None, **attrs):
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}
        return [a for t, a in self.elements if tag in (None, t) and wanted.items() <= a.items()]

    def figures(self):
        return {name: json.loads(data) for name, data in self.scripts.items() if name.endswith("-data")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    write_report(inputs(), out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile")
    write_report(inputs(HOSTILE), out)
    return Page((out / "report.html").read_text(encoding="utf-8"))


# ---- one file that needs nothing else


def test_page_loads_nothing(page):
    loads = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert loads
    assert all(target.startswith("#") for target in loads)
    assert not page.all("link")
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_style_loads_nothing(folder):
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_embedded_once(page):
    assert sum("plotly.js v" in script for script in page.scripts.values()) == 1


def test_links_within_the_page_have_a_target(page):
    ids = [a["id"] for a in page.all() if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)


def test_same_inputs_give_the_same_bytes(folder, tmp_path):
    write_report(inputs(), tmp_path)
    for name in ("report.html", "leaderboard.parquet", "report.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# ---- readable for everyone


def test_every_plot_has_a_name_and_data(page):
    plots = page.all("div", class_="plot")
    assert len(plots) == 3 + 2 + 2
    for plot in plots:
        assert plot["role"] == "img"
        assert plot["aria-label"]
        assert f"{plot['id']}-data" in page.figures()


def test_every_table_lies_in_a_named_region_that_takes_the_focus(page):
    for i, (tag, _) in enumerate(page.elements):
        if tag == "table":
            outer = page.elements[i - 1][1]
            assert (outer["class"], outer["role"], outer["tabindex"]) == ("scroll", "region", "0")
            assert outer["aria-label"]


def test_figures_are_valid_plotly(page):
    for figure in page.figures().values():
        go.Figure(figure)


def test_colours_of_the_figures_exist_in_light_and_dark(page, folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    light, dark = html[: html.index("</style>")].split("@media (prefers-color-scheme: dark)")
    for colour in set(re.findall(r"var\((--[\w-]+)\)", json.dumps(page.figures()))):
        assert f"{colour}:" in light
        assert f"{colour}:" in dark


def test_page_opens_with_the_notes_and_shows_every_number(page):
    compared = comparison(suite="other")
    for note in compared.notes:
        assert note in page.text
    for row in compared.rows:
        for score in (*row.dimensions.values(), *row.benchmarks.values(), row.mean):
            assert f"{score.value:.3f}± {score.stderr:.3f}" in page.text


def test_sections_without_content_are_left_out(tmp_path):
    bare = compare([samples("a", "merged", 3), samples("b", "merged", 4)], SUITE, suite="3h", num_resamples=10)
    write_report(ReportInputs("Bare", bare, None, {}, {}, {}, "2026-08-24"), tmp_path)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [a["id"] for a in found.all("section")] == [
        "leaderboard",
        "benchmarks",
        "dimensions",
        "settings",
        "provenance",
    ]
    assert [a["id"] for a in found.all("div", class_="plot")] == ["plot-bars", "plot-trade-off"]
    assert "cannot say how the settings were chosen" in found.text


# ---- text from users


def test_hostile_names_are_shown_and_add_no_element(page, hostile):
    assert hostile.text.count(HOSTILE) >= 10
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in page.elements]
    assert not any("onclick" in attributes for _, attributes in hostile.elements)


def test_hostile_names_do_not_end_a_script_and_are_no_markup_for_plotly(hostile):
    figures = hostile.figures()
    assert len(figures) == 7
    assert "</script>" not in json.dumps(figures)
    assert "&lt;/script&gt;&lt;b" in json.dumps(figures["plot-bars-data"])


def test_figure_data_cannot_end_its_script_even_without_the_labels_escapes():
    figure = {"title": "</script><!--<script>"}
    text = str(figure_json(figure))
    assert "<" not in text
    assert json.loads(text) == figure


def test_markdown_shows_hostile_names_literally():
    text = leaderboard_markdown(comparison(HOSTILE))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<" not in text
    assert r"&lt;/script&gt;&lt;b" in text


# ---- leaderboard


def test_parquet_is_the_leaderboard_rows(folder):
    rows = leaderboard_rows(comparison(suite="other"))
    table = pq.read_table(folder / "leaderboard.parquet")
    assert table.column_names == list(rows[0])
    assert table.to_pylist() == rows


def test_leaderboard_rows_are_flat_json_with_equal_keys():
    rows = leaderboard_rows(comparison())
    assert len({tuple(row) for row in rows}) == 1
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(isinstance(value, str | int | float | bool | None) for row in rows for value in row.values())
    assert [row["place"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]


def test_column_without_any_value_keeps_a_number_type(tmp_path):
    bare = compare([samples("a", "merged", 3)], SUITE, suite="3h", num_resamples=10)
    write_report(ReportInputs("Bare", bare, None, {}, {}, {}, "2026-08-24"), tmp_path)
    schema = pq.read_schema(tmp_path / "leaderboard.parquet")
    assert str(schema.field("vs_base_mean").type) == "double"


def test_markdown_leaderboard_has_a_line_a_model_and_the_notes():
    compared = comparison()
    text = leaderboard_markdown(compared)
    first = compared.rows[0]
    assert f"| 1 | r\\_tsvm | 1 | {first.dimensions['helpful'].value:.3f} ± " in text
    assert "| limited (partial) |" in text
    assert sum(line.startswith("|") for line in text.splitlines()) == 2 + len(compared.rows)
    assert sum(line.startswith("- ") for line in text.splitlines()) == len(compared.notes)


def test_report_json_holds_the_inputs(folder):
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert record["title"] == "Balance"
    assert record["comparison"]["best_expert"] == inputs().comparison.best_expert
    assert record["interference"]["cosine"][0] == [0.1, None]


def test_number_that_is_not_finite_is_refused_before_anything_is_written(tmp_path):
    good = inputs()
    diagnostics = {"r_tsvm": (LayerDiagnostics(TENSORS[1], {"helpful": 1}, {"helpful": float("nan")}),)}
    bad = ReportInputs("Bad", good.comparison, None, diagnostics, {}, {}, "2026-08-24")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- results as a document


def seeded_inputs():
    """A report over two seeds, with a judge's gap and a partial model."""
    models = [
        replace(one, seed=seed, values=one.values | {"truth": one.values["truth"] | {"7": None if gap else 1.0}})
        for seed in (0, 4)
        for one in [
            samples("base", "base", 2 + seed // 4),
            samples("honest", "expert", 4, specialty="honest"),
            samples("a|b", "merged", 6, settings={"method": "ties", "scale": 0.5}, validation={"mean": 0.6}),
            samples("mix", "mixture", 5 - seed // 4, partial=True),
        ]
        for gap in [one.name == "mix"]
    ]
    return replace(
        inputs(),
        comparison=compare(models, SUITE, suite="3h", num_resamples=200),
        provenance={"machine": "a machine", "torch": "2.13", "model base, seed 0": "made in 3 s"},
        conditions={"truth": {"judge": "rule, version 1", "BOS": "yes"}},
        agreement=({"task": "truth", "kappa": 0.5, "stderr": 0.1, "n": 39, "unparsed_first": 1, "unparsed_second": 0},),
    )


def test_the_results_document_comes_from_a_finished_report(tmp_path, capsys, monkeypatch):
    given = seeded_inputs()
    write_report(given, tmp_path)
    assert results.read_inputs(tmp_path) == given
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path), "--command", "tripoise bench b.yaml --out r"])
    results.main()
    text = capsys.readouterr().out
    assert text == results.results_markdown(given, "tripoise bench b.yaml --out r")
    for part in (
        *("`tripoise bench b.yaml --out r`, finished 2026-08-24T12:00:00+00:00", "Machine: a machine", "torch 2.13"),
        *("seeds of world and training: 0, 4", "**Partial**", "mix (partial)", "## Every seed", "Hypervolume, of 1: "),
        *("## Wins, ties and losses", "## Retention and Pareto front", "2 samples were left out", "2 unread"),
        *("| truth | rule, version 1 | yes | 2 |", "| truth | 0.500 ± 0.100 | 39 | 1 |", "of 2 seeds", r"a\|b"),
    ):
        assert part in text, part
    for row in given.comparison.rows:
        assert f"{row.mean.value:.3f} ± {row.mean.stderr:.3f} | sd {row.mean.spread:.3f}" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(cell.strip() for line in tables for cell in re.split(r"(?<!\\)\|", line)[1:-2])


def test_a_report_of_one_seed_has_no_spread_in_its_document():
    text = results.results_markdown(inputs())
    assert "## Every seed" not in text
    assert " sd " not in text


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no report of this version"):
        results.read_inputs(tmp_path)
    (tmp_path / "report.json").write_text('{"title": "old"}')
    with pytest.raises(CheckpointError, match="no report of this version"):
        results.read_inputs(tmp_path)


def test_every_number_is_beside_the_word_partial_where_a_limit_was_set(tmp_path):
    write_report(seeded_inputs(), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert page.text.count("partial") >= tables - 4  # tables of tensors and conditions have no rows of models
    assert "mix (partial)" in leaderboard_markdown(seeded_inputs().comparison)
    assert page.text.count("From a limited number of samples.") == 3


def test_a_merge_without_its_chat_template_is_flagged(tmp_path):
    given = inputs()
    models = [replace(one, chat_template_lost=one.role == "merged") for one in given.comparison.rows]
    flagged = replace(given, comparison=replace(given.comparison, rows=tuple(models)))
    write_report(flagged, tmp_path)
    assert "no chat template" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert r"r\_tsvm (chat template lost)" in leaderboard_markdown(flagged.comparison)


# ---- layers


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "model.layers.*.mlp.up_proj.weight")),
        ("transformer.h.11.attn.c_attn.bias", (11, "transformer.h.*.attn.c_attn.bias")),
        ("0.experts.7.weight", (0, "*.experts.7.weight")),
        ("lm_head.weight", (None, "lm_head.weight")),
        ("layer2.weight", (None, "layer2.weight")),
    ],
)
def test_tensor_name_splits_at_its_first_number(tensor, expected):
    assert locate(tensor) == expected


def test_interference_maps_share_a_symmetric_scale_and_order_layers_by_number():
    maps = interference_maps(inputs().interference)
    for figure in maps:
        trace = figure["data"][0]
        assert (trace["zmin"], trace["zmax"]) == (-0.5, 0.5)
        assert trace["x"] == ["–", "0", "10"]
    assert maps[0]["layout"]["yaxis"]["ticktext"] == ["embed_tokens", "up_proj", "other"]
    assert maps[0]["data"][0]["z"] == [[0.1, None, None], [None, -0.3, 0.0], [0.2, None, None]]
    assert maps[1]["data"][0]["z"][0] == [None, None, None]


def test_no_tensor_of_a_two_tower_model_hides_another():
    names = ("encoder.layers.0.fc.weight", "decoder.layers.0.fc.weight", "decoder.layers.0.fc.bias")
    figure = interference_maps(Interference(names, ("a · b",), ((0.1,), (0.2,), (0.3,)), (0.2,)))[0]
    assert figure["data"][0]["z"] == [[0.1], [0.2], [0.3]]
    assert len(set(figure["data"][0]["y"])) == 3


def test_decision_lines_run_through_the_mean_of_each_layer():
    entries = [
        LayerDiagnostics(f"layers.{layer}.{kind}.weight", {"a": 10 * layer + bonus}, {"a": 1.0})
        for layer in (1, 0)
        for kind, bonus in (("q", 1), ("k", 3))
    ]
    dots, line = decision_lines(entries, "ranks")["data"]
    assert sorted(zip(dots["x"], dots["y"], strict=True)) == [("0", 1), ("0", 3), ("1", 11), ("1", 13)]
    assert list(zip(line["x"], line["y"], strict=True)) == [("0", 2), ("1", 12)]


def test_ragged_interference_is_refused():
    with pytest.raises(RecipeError, match=r"2 rows of 1 cosines .* got 1 rows of widths \[1\]"):
        Interference(("a", "b"), ("x · y",), ((0.1,),), (0.1,))


def test_front_of_a_pair_is_the_one_of_brute_force():
    rows = comparison().rows
    points = {row.name: (row.dimensions["helpful"].value, row.dimensions["harmless"].value) for row in rows}
    expected = {
        point
        for point in points.values()
        if not any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points.values())
    }
    front = [points[row.name] for row in pair_front(rows, "helpful", "harmless")]
    assert front == sorted(expected)
