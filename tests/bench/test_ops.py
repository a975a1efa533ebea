"""What is measured of the ops: that their forms agree, that what does not agree is not timed, how a record goes on."""

import time
from dataclasses import replace

import pytest
import torch

from bench import kernels
from bench.ops import entries, measure, op, ops, summary
from bench.ops.measure import Row, disagreement, measure_entry
from bench.ops.op import COMPILED, LIMIT, OURS, Form
from bench.record import Record

CPU = torch.device("cpu")
ENTRIES = entries(CPU)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One round: nothing here looks at times."""
    real = measure.timing.samples
    monkeypatch.setattr(measure.timing, "samples", lambda calls, device, seconds: real(calls, device, 0.0, least=1, most=1))


def entry_of(name, direction=None):
    return next(entry for entry in ENTRIES if entry.op.name == name and direction in (None, entry.direction))


def plain_forms(entry):
    return [form for form in measure.chosen_forms(entry, CPU) if form != COMPILED]


# In its last direction: a backward has the forward in it.
@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.direction == entry.op.directions[-1]], ids=lambda e: e.name(torch.float32)
)
def test_the_forms_of_every_op_agree(entry):
    rows = measure_entry(entry, CPU, torch.float32, forms=plain_forms(entry))
    assert [row.form for row in rows] == [*plain_forms(entry), LIMIT]
    assert {row.form: row.note for row in rows if row.note} == {}
    for row in rows:
        assert row.median_ms > 0 and row.percent_of_limit > 0
        assert (row.peak_MiB is None) == (row.form == LIMIT)


def test_every_op_has_its_peers_and_a_compiled_form_runs():
    found = {each.name: set(each.all_forms) for each in ops()}
    assert found["linear_ppo_loss"] == {OURS, "torch", "TRL", "Liger-Kernel", COMPILED}
    assert {"peft", "fastppo buffer"} <= found["lora layer (7 linears)"]
    assert all({OURS, each.reference} <= set(each.all_forms) for each in ops())
    assert COMPILED in measure.chosen_forms(entry_of("ppo_loss (policy and value)"), CPU)


def broken(entry, run):
    forms = dict(entry.op.forms) | {"peer": Form(run)}
    return replace(entry, op=replace(entry.op, forms=forms, compiled=False))


def row_of(entry, form):
    return next(row for row in measure_entry(entry, CPU, torch.float32) if row.form == form)


def test_a_wrong_form_is_not_timed():
    entry = entry_of("rms_norm", "fwd")
    row = row_of(broken(entry, lambda inputs: {"y": 1.01 * inputs["x"] * inputs["weight"]}), "peer")
    assert row.note.startswith("wrong: y is off by") and row.median_ms is None


def test_a_wrong_gradient_is_not_timed():
    entry = entry_of("swiglu", "fwd+bwd")

    def half(inputs):
        gate, up = inputs["gate"], inputs["up"]
        return {"h": torch.nn.functional.silu(gate) * (up.detach() + 0.5 * (up - up.detach()))}

    assert row_of(broken(entry, half), "peer").note.startswith("wrong: gradient")


def test_a_form_that_fails_or_lacks_memory_says_so_and_the_others_are_timed():
    def fails(inputs):
        raise RuntimeError("no kernel\nand a long story")

    def runs_out(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    entry = entry_of("rms_norm", "fwd")
    assert row_of(broken(entry, fails), "peer").note == "failed: RuntimeError: no kernel"
    assert row_of(broken(entry, runs_out), "peer").note == "out of memory"
    assert row_of(broken(entry, runs_out), OURS).median_ms > 0


def test_memory_that_runs_out_while_timing_takes_one_form_out(monkeypatch):
    calls = []

    def late(inputs):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"y": op_result(inputs)}

    def op_result(inputs):
        return entry.op.all_forms["torch"].run(inputs)["y"]

    entry = entry_of("rms_norm", "fwd")
    rows = {row.form: row for row in measure_entry(broken(entry, late), CPU, torch.float32)}
    assert rows["peer"].note == "out of memory" and rows["peer"].median_ms is None
    assert rows[OURS].median_ms > 0 and rows[LIMIT].median_ms > 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"y": torch.tensor([1.0, 2.004])}, None),
        ({"y": torch.tensor([1.0, 2.02])}, "y is off by 0.02, its largest entry is 2"),
        ({"y": torch.tensor([1.0, float("nan")])}, "y is off by nan, its largest entry is 2"),
        ({"y": torch.tensor([[1.0, 2.0]])}, "y has shape [1, 2], not [2]"),
        ({"z": torch.tensor([1.0, 2.0])}, "nothing in common with the reference's results"),
        ({"y": torch.tensor([1.0, 2.0]), "z": torch.tensor(3.0)}, None),
    ],
)
def test_what_counts_as_wrong(value, said):
    assert disagreement(value, {"y": torch.tensor([1.0, 2.0])}, 5e-3) == said


def test_a_draw_of_a_token_that_top_k_leaves_out_is_wrong():
    entry = next(entry for entry in ENTRIES if "top-k" in entry.size)

    def least_likely(inputs):
        scaled = inputs["logits"].float() / 0.7
        token = scaled.argmin(-1)
        return {"token": token, "logprob": scaled.log_softmax(-1).gather(1, token[:, None]).squeeze(1)}

    assert row_of(broken(entry, least_likely), "peer").note.startswith("wrong: allowed")


def made_up():
    """fastppo 2 ms, torch 6 ms, the limit 1 ms; the buffer form is no peer."""
    times = {OURS: 2.0, "fastppo buffer": 1.5, "torch": 6.0, LIMIT: 1.0}
    rows = {name: Row("op", "family", "T4", "fwd", "fp32", name) for name in (*times, "Liger-Kernel")}
    taken = {name: measure.timing.Samples([ms, ms * 1.1, ms * 0.9]) for name, ms in times.items()}
    measure._fill(rows, taken)
    rows["Liger-Kernel"].note = "out of memory"
    return list(rows.values())


def test_ratios_and_percent_of_the_limit():
    rows = {row.form: row for row in made_up()}
    assert rows["torch"].ratio == pytest.approx(3.0) and rows[OURS].ratio == pytest.approx(1.0)
    assert rows[OURS].percent_of_limit == pytest.approx(50.0) and rows["torch"].percent_of_limit == pytest.approx(100 / 6)
    assert (rows[OURS].low_ms, rows[OURS].high_ms) == pytest.approx((1.9, 2.1))
    assert summary.peers_ratio(made_up()) == {"torch": pytest.approx(3.0)}


def test_the_table():
    lines = [line.split() for line in summary.tables(made_up())]
    assert lines[1] == ["op", "fwd", "T4", "fp32"]
    assert ["fastppo", "2.000", "ms", "0.200", "ms", "50", "%"] in lines
    assert ["torch", "6.000", "ms", "0.600", "ms", "3.00", "x", "17", "%"] in lines
    assert ["Liger-Kernel", "out", "of", "memory"] in lines


# -- the record ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two small ops, whose measurements are counted; without the compiled form, which takes seconds to start."""
    entries = (entry_of("rms_norm", "fwd"), entry_of("swiglu", "fwd"))
    chosen = [replace(entry, op=replace(entry.op, compiled=False)) for entry in entries]
    done = []

    def counted(entry, *args, **how):
        done.append((entry.op.name, how["forms"] == [COMPILED]))
        return measure_entry(entry, *args, **how)

    monkeypatch.setattr(kernels, "entries", lambda device: chosen)
    monkeypatch.setattr(kernels, "measure_entry", counted)
    return done


def run(path, *, seconds=60.0, only=None):
    return kernels.measure(CPU, path, time.monotonic() + seconds, only)


def test_a_record_is_kept_and_a_complete_one_begun_anew(few, tmp_path):
    path = tmp_path / "ops.json"
    record = run(path)
    assert record.complete and [name for name, _ in few] == ["rms_norm", "swiglu"]
    stored = Record.load(path)
    assert stored.figures == record.figures and stored.data["rows"] == record.data["rows"]
    assert stored.figures["rms_norm fwd M512 K128 fp32 | fastppo"].unit == "ms"
    assert stored.figures["rms_norm fwd M512 K128 fp32 | ratio to torch"].better == "higher"
    assert stored.figures["swiglu fwd M512 N352 fp32 | fastppo | MiB"].value > 0
    assert any("Liger-Kernel" in note for note in stored.notes)
    assert run(path).complete and len(few) == 4


def test_a_record_goes_on_with_what_is_missing(few, tmp_path):
    path = tmp_path / "ops.json"
    assert not run(path, only=["swiglu"]).complete
    record = run(path)
    assert record.complete and [name for name, _ in few] == ["swiglu", "rms_norm"]
    assert {row["op"] for row in record.data["rows"]} == {"rms_norm", "swiglu"}
    again = run(path, only=["swiglu"])
    assert [name for name, _ in few] == ["swiglu", "rms_norm", "swiglu"]
    assert again.complete and len(again.data["rows"]) == len(record.data["rows"])


def test_no_time_left_measures_nothing_and_says_so(few, tmp_path):
    record = run(tmp_path / "ops.json", seconds=-1.0)
    assert not record.complete and few == [] and Record.load(tmp_path / "ops.json") is not None


def test_figures_of_other_sources_are_not_gone_on_with(few, tmp_path, monkeypatch):
    path = tmp_path / "ops.json"
    run(path, only=["swiglu"])
    monkeypatch.setattr(kernels, "sources", lambda *folders: "changed")
    record = run(path)
    assert [name for name, _ in few] == ["swiglu", "rms_norm", "swiglu"]
    assert "swiglu fwd M512 N352 fp32 | ratio to torch" in record.reference


def test_names_hold_what_was_measured():
    entry = entry_of("linear_ppo_loss")
    assert entry.name(torch.bfloat16) == "linear_ppo_loss fwd+bwd T512 V4096 H128 bf16"
    sizes = [size for each in ops() for size in each.sizes(torch.device("cuda"))]
    assert "T8192 V152064 H3584" in sizes and "M8192 7B r16" in sizes
    assert len({op.Entry(each, size, way, None).name(torch.float32) for each in ops() for size in each.sizes(CPU)
                for way in each.directions}) == len(ENTRIES)  # fmt: skip
