"""The report: complete, escaped, self-contained, and honest about what beats what."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.refactor.redundancy import routing_redundancy
from fissile.run.advice import advise, compare
from fissile.run.choice import choose
from fissile.run.metrics import Metrics, Score, parse_metrics, read_metrics
from fissile.run.report import CAPTIONS, write_report
from fissile.run.report_tables import summary_rows

DOMAINS = {"c": 20.0, "english": 35.0, "python": 28.0}
TOKENS = [300 + 17 * i for i in range(24)]


def score(factor: float, noise: float = 0.004, seed: int = 0) -> dict[str, Any]:
    """A model `factor` times as perplexed as the dense one; documents differ far more."""
    spread, own = random.Random(0), random.Random(f"{factor}/{seed}")
    names = list(DOMAINS)
    nats = [math.log(DOMAINS[names[i % 3]]) + spread.gauss(0, 0.3) for i in range(len(TOKENS))]
    nll = [
        (v + math.log(factor) + own.gauss(0, noise)) * n for v, n in zip(nats, TOKENS, strict=True)
    ]
    ppl = math.exp(sum(nll) / sum(TOKENS))
    return {
        "ppl": ppl,
        "stderr": 0.06 * ppl,
        "by_domain": {name: factor * base for name, base in DOMAINS.items()},
        "n_tokens": sum(TOKENS),
        "document_nll": nll,
        "document_tokens": TOKENS,
    }


def variant(name: str, factor: float, share: float = 0.5, recovery: str = "none") -> dict[str, Any]:
    return {"name": name, "share": share, "recovery": recovery, **score(factor)}


def width(method: str, bits: int | None, factor: float, **more: Any) -> dict[str, Any]:
    size = 16_000_000 * (bits or 16) // 16
    row = {"method": method, "bits": bits, "bits_per_weight": (bits or 16) + 0.5, "bytes": size}
    return {**row, **score(factor), **more}


def redundancy() -> dict[str, Any]:
    choices = [torch.tensor([[0, 1], [1, 2], [0, 1], [2, 3]]).roll(i, 0) for i in range(3)]
    return routing_redundancy(choices, torch.zeros(4, dtype=torch.int64), num_experts=4)


def full() -> dict[str, Any]:
    factors = {"static": 1.3, "random": 2.0, "ridge": 1.25, "pregate": 1.2, "oracle": 1.1}
    return {
        "name": "trial",
        "source": "some-model",
        "seed": 3,
        "active_share": 0.5,
        "dense": score(1.0, 0.0),
        "dense_bytes": 16_000_000,
        "variants": [variant(n, f) for n, f in factors.items()]
        + [variant(n, 1 + (f - 1) * 0.7, recovery="refit") for n, f in factors.items()],
        "widths": [width("float", None, 1.14)]
        + [
            width(m, b, f)
            for b, f in ((2, 1.8), (3, 1.25), (4, 1.16))
            for m in ("nested", "dedicated", "gptq", "rtn")
        ],
        "layers": [
            {"layer": i, "tensor": t, "loss": {"2": 0.05 + i / 99, "3": 0.01, "4": 0.002}}
            for i in range(3)
            for t in ("self_attn.q_proj.weight", "mlp.experts.down_proj")
        ],
        "recovery_curve": [{"step": i, "loss": 1 / (i + 1)} for i in range(30)],
        "router_curve": [2.0 - i / 50 for i in range(50)],
        "routing": {
            "num_experts": 4,
            "top_k": 2,
            "expert_load": [[0.3, 0.3, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]],
            "domain_expert": {
                "domains": list(DOMAINS),
                "matrix": [[0.9, 0.5, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5], [None, None, None, None]],
            },
            "recall_at_k": [0.6, 0.7, 0.5],
            "oracle_mass": 0.9,
            "gap_closed": [0.4, 0.6, 0.2],
            "switch_rate": 0.4,
            "entropy": 0.97,
            "redundancy": {"ridge": redundancy()},
        },
        "routers": [{"name": "pregate", "share": 0.5, "recall_at_k": [0.6, 0.7], "mass": [0.9]}],
        "weights": {"ffn": 6_000_000, "attention": 1_000_000, "head": 1_000_000},
        "divisions": [{"wanted": 0.5, "share": 0.5, "shared": 0.25, "num_experts": 6, "top_k": 2}],
        "stages": [{"name": "calibrate", "seconds": 3.5, "peak_rss_bytes": 600_000_000}],
        "verify": [{"name": "reload", "ok": True, "detail": "bit-identical"}],
        "conditions": {"context": 512, "domains": list(DOMAINS)},
    }


def write(folder: Path, metrics: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


class Reader(HTMLParser):
    """Collects what a browser would fetch, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action", "poster"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def test_a_full_report_has_every_figure_and_table(tmp_path: Path) -> None:
    page, data = write_report(write(tmp_path, full()))
    reader = read_page(page)
    text = " ".join(reader.text)
    assert reader.tags.count("figure") == len(CAPTIONS) + 3 == 12
    assert text.count("Not run.") == 1  # of the evaluations, which are files of their own
    words = ("Choices of the ridge router", "φ", "1.60", "oracle router", "nested, 2 bits", "GPTQ")
    for word in (*words, "mlp.experts.down_proj", "reload"):
        assert word in text
    dense = full()["dense"]["ppl"]
    assert f"{dense:.2f}" in text
    report = json.loads(data.read_text())
    assert report["summary"][0] == {
        "model": "dense",
        "bytes": 16_000_000,
        "ppl": pytest.approx(dense),
        "stderr": pytest.approx(0.06 * dense),
        "percent_against_dense": None,
        "percent_error": None,
    }
    assert [row["model"] for row in report["summary"]][-1] == "nested, 2 bits"
    assert report["summary"][-1]["percent_against_dense"] == pytest.approx(80, abs=1)


def test_the_plan_stands_beside_the_measured_cost(tmp_path: Path) -> None:
    write(tmp_path, {"name": "cost", "stages": full()["stages"]})
    stage = {"stage": "calibrate", "peak_memory_bytes": 634_000_000, "seconds": [1.5, 7.25]}
    (tmp_path / "plan.json").write_text(json.dumps({"stages": [stage, {"stage": "odd"}]}))
    text = " ".join(read_page(write_report(tmp_path)[0]).text)
    assert "600.0 1.5 to 7.2 634.0" in text
    (tmp_path / "plan.json").write_text("[")
    assert "planned" not in " ".join(read_page(write_report(tmp_path)[0]).text)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page, _ = write_report(write(tmp_path, full()))
    reader = read_page(page)
    assert len(reader.links) == 24
    assert all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    assert "script" not in reader.tags
    for link in reader.links:
        svg = base64.b64decode(link.split(",", 1)[1]).decode()
        fetched = re.findall(r"(?:href|src)=[\"']([^\"']*)|url\(([^)]*)\)", svg)
        assert all(a.startswith("#") or b.startswith("#") for a, b in fetched)
    rest = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]*", "", page.read_text())
    assert "http:" not in rest.replace("http-equiv", "")
    assert "https:" not in rest
    assert "default-src 'none'" in rest


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    first, _ = write_report(write(tmp_path / "a", full()))
    second, _ = write_report(write(tmp_path / "b", full()))
    assert first.read_bytes() == second.read_bytes()


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    metrics = full() | {"source": evil, "name": evil}
    metrics["verify"] = [{"name": evil, "ok": False, "detail": evil}]
    metrics["layers"][0]["tensor"] = evil
    metrics["dense"]["by_domain"] = {evil: 3.0, "b": 4.0}
    metrics["conditions"] = {evil: evil}
    write(tmp_path, metrics)
    (tmp_path / "recipe.yaml").write_text(f"name: {evil}\n")
    (tmp_path / "ledger.csv").write_text(
        f"kind,stage,layer,module,detail,value\n<b>kind</b>,s,0,m,{evil.replace(chr(34), '')},1\n"
    )
    reader = read_page(write_report(tmp_path)[0])
    assert "script" not in reader.tags
    parsed = parse_metrics(metrics, "x")
    assert reader.tags.count("b") == len([*advise(parsed), *choose(parsed)])
    assert "".join(reader.text).count("<script>") >= 6
    assert "<b>kind</b>" in "".join(reader.text)


@pytest.mark.parametrize(
    "missing", ["dense", "dense_bytes", "layers", "routing", "variants", "widths"]
)
def test_any_section_may_be_missing(tmp_path: Path, missing: str) -> None:
    metrics = full()
    del metrics[missing]
    page, _ = write_report(write(tmp_path, metrics))
    assert "What to use" in page.read_text()


def test_an_almost_empty_run_says_what_was_not_run(tmp_path: Path) -> None:
    page, data = write_report(write(tmp_path, {"name": "bare"}))
    text = " ".join(read_page(page).text)
    assert text.count("Not run.") >= 6
    assert "No held-out measurement was made" in text
    assert json.loads(data.read_text())["summary"] == []


def test_broken_numbers_do_not_break_the_page(tmp_path: Path) -> None:
    metrics = full()
    for row in (*metrics["variants"], *metrics["widths"]):
        row["ppl"], row["by_domain"]["c"] = float("inf"), float("nan")
        row["document_nll"] = []
    metrics["layers"][0]["loss"] = {"2": float("nan")}
    metrics["widths"][1]["ppl"] = 1e9
    page, data = write_report(write(tmp_path, metrics))
    assert "inf" not in json.dumps(json.loads(data.read_text())["summary"])
    assert page.stat().st_size > 10_000


def test_an_artifact_stands_for_its_run_folder(tmp_path: Path) -> None:
    write(tmp_path, full())
    (tmp_path / "model").mkdir()
    page, _ = write_report(tmp_path / "model")
    assert page == tmp_path / "report.html"


def test_refusals_name_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metrics\.json.*--resume"):
        write_report(tmp_path)
    write(tmp_path, full() | {"widhts": []})
    with pytest.raises(CorruptCheckpoint, match=r"metrics\.json: widhts"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="not readable JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_metrics_survive_a_round_trip(tmp_path: Path) -> None:
    metrics = parse_metrics(full(), "here")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics.to_dict(), allow_nan=False))
    assert read_metrics(tmp_path / "metrics.json") == metrics


# -- advice ------------------------------------------------------------------------------------


def advice(changes: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for item in advise(parse_metrics(full() | changes, "here")):
        found.setdefault(item.topic, []).append((item.level, item.text))
    return found


@pytest.mark.parametrize(
    ("static", "pregate", "level", "phrase"),
    [
        (1.30, 1.20, "good", "7.7 ± 0.1 % lower than the static model's"),
        (1.20, 1.30, "warning", "Use the static model"),
        (1.2005, 1.20, "warning", "Prefer the static model"),
    ],
)
def test_routing_is_judged_against_the_static_model(
    static: float, pregate: float, level: str, phrase: str
) -> None:
    rows = [variant("static", static), variant("pregate", pregate), variant("oracle", 1.1)]
    [(found, text)] = advice({"variants": rows})["routing"]
    assert found == level
    assert phrase in text


def test_the_gap_to_the_oracle_is_stated_when_routing_pays() -> None:
    rows = [variant("static", 1.44), variant("pregate", 1.2), variant("oracle", 1.0)]
    [(_, text)] = advice({"variants": rows})["routing"]
    assert "closes 50.2 ± 0.2 % of the gap" in text


def test_only_the_same_recovery_is_compared() -> None:
    rows = [variant("static", 1.2), variant("pregate", 1.3)]
    trained = variant("pregate", 1.1, recovery="trained")
    [(level, text)] = advice({"variants": [*rows, trained]})["routing"]
    assert level == "warning"
    assert "before recovery" in text
    assert "static model was not" in text


def test_a_router_without_a_control_is_not_judged() -> None:
    rows = [variant("static", 1.2), variant("pregate", 1.1, recovery="trained")]
    [(level, text)] = advice({"variants": rows})["routing"]
    assert level == "note"
    assert "nothing compares" in text


def test_each_share_is_judged_on_its_own() -> None:
    rows = [
        variant("static", 1.1, 0.75), variant("pregate", 1.2, 0.75),
        variant("static", 1.5, 0.5), variant("pregate", 1.2, 0.5),
    ]  # fmt: skip
    found = advice({"variants": rows})["routing"]
    assert "active share 0.75" in found[0][1]
    assert "active share 0.5" in found[1][1]
    assert [level for level, _ in found] == ["warning", "good"]


def test_a_router_that_learned_nothing_is_called_out() -> None:
    rows = [variant("random", 1.2), variant("pregate", 1.2005), variant("ridge", 1.1)]
    levels = [level for level, _ in advice({"variants": rows})["router"]]
    assert levels == ["warning", "note"]


def test_four_bits_alone_win_at_equal_memory() -> None:
    rows = [*full()["widths"], width("nested", 4, 1.02, of="dense")]
    [*_, (level, text)] = advice({"widths": rows})["memory"]
    assert level == "warning"
    assert "Use 4-bit weights alone" in text
    assert "was not measured" in advice({})["memory"][-1][1]


def test_the_quantized_dense_model_is_not_taken_for_the_converted_one() -> None:
    """Its rows differ in one field; with them the advice on nesting stays what it was."""
    rows = [width("nested", 4, 0.5, of="dense"), *full()["widths"]]
    assert advice({"widths": rows})["nesting"] == advice({})["nesting"]
    metrics = parse_metrics(full() | {"widths": rows}, "here")
    names = [row["model"] for row in summary_rows(metrics)]
    assert len(names) == len(set(names))
    assert "dense, nested, 4 bits" in names


def test_widths_and_plain_quantizers_are_judged() -> None:
    found = advice({"widths": [width("float", None, 1.1), width("nested", 4, 1.12),
                               width("nested", 2, 1.9), width("gptq", 4, 1.11)]})  # fmt: skip
    assert found["width"][0][0] == "warning"
    assert "At 2 bits" in found["width"][0][1]
    assert "plain GPTQ" in found["nesting"][0][1]


def test_failed_checks_come_first() -> None:
    failed = [{"name": "hashes", "ok": False, "detail": ""}]
    first = advise(parse_metrics(full() | {"verify": failed}, "here"))[0]
    assert first.level == "warning"
    assert "do not use" in first.text


def test_comparison_is_paired_where_documents_are_the_same() -> None:
    near = Score(**score(1.0, 0.0)), Score(**score(1.01))
    paired = compare(near[1], near[0])
    assert paired is not None
    assert paired.verdict == "worse"
    alone = [s.model_copy(update={"document_nll": [], "document_tokens": []}) for s in near]
    unpaired = compare(alone[1], alone[0])
    assert unpaired is not None
    assert unpaired.verdict == "same"
    assert unpaired.percent == pytest.approx(paired.percent)
    assert compare(Score(ppl=None), near[0]) is None


def test_unused_metrics_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="extra_field"):
        Metrics(name="x", extra_field=1)  # type: ignore[call-arg]
