"""Benchmarks: timings, medians, failures, resuming, tables. Nothing here asserts on a time."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from benchmarks.race import modes as field
from benchmarks.race import runner
from benchmarks.race.architectures import AbsentError, config_of, make_model
from benchmarks.race.chart import draw_chart
from benchmarks.race.contenders import Contender, ReadyContender, Workload, contenders
from benchmarks.race.heats import find_finalists, pacemaker
from benchmarks.race.journal import Journal
from benchmarks.race.modes import MODES
from benchmarks.race.runner import BenchmarkPlan, run_plan
from benchmarks.race.summary import deciding_results, markdown, race_results
from skipway.errors import SkipwayError
from skipway.inference.timer import Candidate, Timing, round_speedups, time_interleaved

WORKLOAD = Workload(network="resnet50", what="infer", precision="float32", batch=4, size=64)


class Clock:
    """Time that passes where the contenders say so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float):
        def run() -> None:
            self.now += seconds

        return run


def broken() -> None:
    raise RuntimeError("no\nsuch operator")


def test_each_takes_a_turn_a_round_in_rotated_order():
    clock = Clock()
    timings = list(time_interleaved([Candidate(name, clock.takes(1.0), name) for name in "abc"], 3, clock=clock))
    assert ["".join(timing.name for timing in timings if timing.round == number) for number in range(3)] == [
        "abc",
        "bca",
        "cab",
    ]
    assert {timing.seconds for timing in timings} == {1.0}


def test_a_failure_is_a_turn_with_its_reason_and_the_others_go_on():
    clock = Clock()
    timings = list(time_interleaved([Candidate("a", clock.takes(1.0)), Candidate("b", broken)], 2, clock=clock))
    assert [(timing.name, timing.round) for timing in timings] == [("a", 0), ("b", 0), ("a", 1)]
    assert timings[1].error == "RuntimeError: no such operator"


def test_slow_ones_leave_their_group_and_the_best_of_each_stays():
    clock = Clock()
    seconds = {"fast": ("ours", 1.0), "best": ("peer", 5.0), "slow": ("peer", 11.0)}
    timings = list(
        time_interleaved(
            [Candidate(name, clock.takes(s), group) for name, (group, s) in seconds.items()], 3, clock=clock
        )
    )
    assert [(timing.name, timing.dropped) for timing in timings if timing.dropped] == [("slow", "2.2x the fastest")]
    assert [timing.name for timing in timings if timing.round == 2] == ["fast", "best"]


def test_a_turn_of_several_calls_is_the_time_of_one_and_waits_for_all():
    clock = Clock()
    waits = clock.takes(8.0)  # what a GPU still has to do when the calls are through
    (timing,) = time_interleaved([Candidate("a", clock.takes(1.0), calls=4, finish=waits)], 1, clock=clock)
    assert timing.seconds == (4 * 1.0 + 8.0) / 4


def test_the_limit_ends_a_race_after_one_round():
    clock = Clock()
    timings = list(
        time_interleaved([Candidate(name, clock.takes(9.0), name) for name in "ab"], 5, limit=1.0, clock=clock)
    )
    assert [(timing.name, timing.round) for timing in timings] == [("a", 0), ("b", 0)]


def test_known_turns_are_not_taken_again():
    clock = Clock()
    known = [Timing("a", 0, 1.0), Timing("b", 0, error="gone"), Timing("c", 0, 1.0)]
    timings = list(
        time_interleaved([Candidate(name, clock.takes(1.0), name) for name in "abc"], 2, known=known, clock=clock)
    )
    assert sorted((timing.name, timing.round) for timing in timings) == [("a", 1), ("c", 1)]


def test_ratios_are_of_rounds_that_both_were_in():
    seconds = {"ours": {0: 1.0, 2: 2.0}, "theirs": {0: 3.0, 1: 9.0, 2: 3.0}}
    assert round_speedups(seconds, "ours", "theirs") == [3.0, 1.5]


def test_the_same_architecture_in_every_library():
    for library in ("timm", "torchvision", "transformers"):
        if find_spec(library) is None:
            continue
        counts = {
            name: sum(p.numel() for p in make_model(name, "vit@6", 32).parameters()) for name in ("skipway", library)
        }
        assert len(set(counts.values())) == 1, counts
    if find_spec("timm") is not None:
        with pytest.raises(AbsentError, match="timm has no resnet@9"):
            make_model("timm", "resnet@9", 32)
    assert config_of("resnet@10", 32).branches == 10


def test_frozen_is_frozen_also_behind_a_compiled_model_of_its_class(monkeypatch):
    """One class is one code object: what was compiled for the first model would run the second."""
    from torch._inductor import freezing

    called = []
    real = freezing.freeze
    monkeypatch.setattr(freezing, "freeze", lambda *given, **named: called.append(1) or real(*given, **named))

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    images = torch.randn(2, 4)
    with torch.no_grad():
        MODES["compiled"].ready(Tiny().eval(), images, "float32")(images)
        assert not called
        model = Tiny().eval()
        given = MODES["frozen"].ready(model, images, "float32")(images)
        assert called
        assert torch.allclose(given, model(images), atol=1e-5)
    torch.compiler.reset()


def test_peers_under_our_switches_are_told_apart():
    found = contenders("train", "float32", peers=["timm"])
    assert {each.side for each in found if each.switched and each.library == "timm"} == {"switched"}
    assert {each.side for each in found if each.library == "skipway"} == {"ours"}
    assert not any(each.mode == "frozen" or each.mode.startswith("optimize") for each in found)


def test_a_gpu_has_its_own_field():
    plan = BenchmarkPlan(device="cuda", what=["infer", "train"], peers=["timm"], precisions=["bfloat16"])
    assert {workload.device for workload in plan.workloads()} == {"cuda"}
    assert {workload.batch for workload in plan.workloads()} == {128}
    assert plan.networks == ("resnet50", "vit-base-16", "convnext-base", "swin-base")
    given = {"peers": ["timm"], "device": "cuda"}
    trains = [str(each) for each in contenders("train", "bfloat16", **given)]
    infers = [str(each) for each in contenders("infer", "bfloat16", **given)]
    assert {"timm compiled-channels-last", "skipway accelerate-compiled", "timm channels-last + switches"} <= set(
        trains
    )
    assert {"skipway optimize-inductor", "timm frozen"} <= set(infers)
    # the switches are a CPU's: on a GPU they do nothing but put our kernels in
    assert not [name for name in infers if "switches" in name or "openvino" in name]
    here = [str(each) for each in contenders("train", "bfloat16", peers=["timm"])]
    assert not [name for name in here if "compiled-channels-last" in name]


def tiny_plan(**others) -> BenchmarkPlan:
    given = {"networks": ["vit@4"], "what": ["infer"], "precisions": ["float32"], "batches": [2], "sizes": [32]}
    return BenchmarkPlan(
        **{**given, "peers": [], "modes": ["eager"], "rounds": 2, "switches": False, "ceilings": False, **others}
    )


def test_a_contender_that_fails_becomes_a_row(tmp_path, monkeypatch):
    def refuse(model, images, precision, known):
        raise RuntimeError("not on this machine")

    mode = field.Mode(what=field.BOTH, who=field.SELF, ready=refuse)
    monkeypatch.setitem(MODES, "hopeless", mode)
    journal = run_plan(tiny_plan(modes=["eager", "hopeless"]), tmp_path)
    (row,) = [row for row in journal.of("prepared") if row["error"]]
    assert row["name"] == "skipway hopeless"
    assert row["error"] == "RuntimeError: not on this machine"
    assert "not on this machine" in markdown(journal)
    assert len(journal.of("timing")) == 2


def test_what_is_there_is_not_measured_again(tmp_path):
    run_plan(tiny_plan(), tmp_path)
    said: list[str] = []
    before = len(Journal(tmp_path).of("timing"))
    run_plan(tiny_plan(), tmp_path, said.append)
    assert said == ["infer vit@4 float32 2x32: measured already"]
    assert len(Journal(tmp_path).of("timing")) == before == 2


def test_an_interrupted_race_goes_on_with_the_rounds_that_are_left(tmp_path):
    journal = run_plan(tiny_plan(), tmp_path)
    lines = journal.path.read_text().splitlines()
    last = next(place for place in range(len(lines) - 1, 0, -1) if '"timing"' in lines[place])
    journal.path.write_text("\n".join(lines[:last]) + '\n{"kind": "timing", "ce')
    assert [timing.round for timing in Journal(tmp_path).races()[0].timings] == [0]
    again = run_plan(tiny_plan(), tmp_path)
    assert [timing.round for timing in again.races()[0].timings] == [0, 1]


def recorded(folder) -> Journal:
    """A race as it would be written, with round times."""
    journal = Journal(folder)
    sides = {"timm frozen": "peer", "timm eager": "peer", "timm eager + switches": "switched", "skipway eager": "ours"}
    seconds = dict(zip(sides, ((0.2, 0.4), (0.4, 0.8), (0.15, 0.3), (0.1, 0.2)), strict=True))
    journal.write({"kind": "ceiling", "when": "start", "precision": "float32", "flops": 8e9, "how": "matmul 1x1x1"})
    journal.write({"kind": "race", "workload": asdict(WORKLOAD), "names": list(sides), "rounds": 2})
    for name, side in sides.items():
        row = {
            "kind": "prepared",
            "workload": asdict(WORKLOAD),
            "name": name,
            "side": side,
            "parameters": 7,
            "error": "",
        }
        journal.write({**row, "build_seconds": 0.5, "prepare_seconds": 2.0})
        for number, taken in enumerate(seconds[name]):
            timing = {"name": name, "round": number, "seconds": taken, "error": "", "dropped": ""}
            journal.write({"kind": "timing", "workload": asdict(WORKLOAD), **timing})
    journal.write({"kind": "end", "workload": asdict(WORKLOAD), "flops": 400_000_000})
    return journal


def test_the_best_peer_is_one_without_our_switches(tmp_path):
    (found,) = race_results(recorded(tmp_path))
    assert found.best == {"peer": "timm frozen", "switched": "timm eager + switches", "ours": "skipway eager"}
    assert found.gain("skipway eager", "peer").median == pytest.approx(2.0)
    assert found.gain("skipway eager", "switched").median == pytest.approx(1.5)
    assert found.ceiling == pytest.approx(80.0)


def test_the_table_and_the_chart(tmp_path):
    journal = recorded(tmp_path)
    text = markdown(journal)
    assert "| resnet50 | 4x64 | 13.3 | timm frozen | 17.8 | – | – | 26.7 | eager | 2.00 (2.00 to 2.00) | 1.50" in text
    assert "Ceiling in float32: 8 GFLOP/s" in text
    pytest.importorskip("matplotlib")
    assert draw_chart(race_results(journal), tmp_path / "speed.png").stat().st_size > 5000


def test_devices_have_tables_of_their_own(tmp_path):
    journal = recorded(tmp_path)
    assert '"device": "cpu"' in journal.path.read_text()
    text = journal.path.read_text()
    other = text.replace('"device": "cpu"', '"device": "cuda"').replace(
        '"precision": "float32", "flops"', '"device": "cuda", "precision": "float32", "flops"'
    )
    journal.path.write_text(text.replace(', "device": "cpu"', "") + other)  # rows of before there were devices, too
    found = race_results(Journal(tmp_path))
    assert [each.race.workload.device for each in found] == ["cpu", "cuda"]
    assert found[0].ceiling == found[1].ceiling == pytest.approx(80.0)
    text = markdown(Journal(tmp_path))
    for title in ("## Inference in float32, images a second\n", "## Inference in float32, images a second on cuda\n"):
        assert title in text
    assert "Ceiling in float32 on cuda: 8 GFLOP/s" in text


def test_where_preparing_takes_the_budget_ours_are_left_out_and_no_peer(tmp_path, monkeypatch):
    clock, journal = Clock(), Journal(tmp_path)
    monkeypatch.setattr(runner.time, "perf_counter", clock)

    def slow(contender, workload, known, choice):
        clock.takes(10.0)()
        return ReadyContender(clock, contender.within, 7, 0.0, 10.0)

    monkeypatch.setattr(runner, "prepare", slow)
    plan = BenchmarkPlan(networks=["resnet50"], peers=["timm", "torchvision"], budget=30.0)
    wanted = contenders("infer", "float32", peers=["timm", "torchvision"], modes=["eager"], switched=False)
    known = journal.race(WORKLOAD, [str(each) for each in wanted], 1)
    ready = runner.prepare_all(plan, WORKLOAD, wanted, known, journal, lambda text: None)
    assert [each.library for each in ready] == ["timm", "torchvision"]


def test_heats_compare_by_the_pacemaker_and_the_final_decides(tmp_path, monkeypatch):
    """The second heat runs on a machine half as fast; frozen is faster than eager all the same."""
    clock = Clock()
    seconds = {"channels-last": 1.0, "eager": 0.9, "autocast": 0.8, "openvino": 0.4, "optimize-torch": 0.3}
    slower = 1.0

    def ready(contender, workload, known, choice=None):
        assert choice is None or choice.pieces == 4
        searched = contender.mode == "openvino"
        run = lambda: clock.takes(slower * seconds[contender.mode])()  # noqa: E731
        found = field.Choice("peer", pieces=4) if searched else None
        return ReadyContender(run, contender.within("cpu"), 7, 0.0, 1.0, found, 3 if searched and choice is None else 0)

    monkeypatch.setattr(runner, "prepare", ready)
    monkeypatch.setattr(runner, "workload_flops", lambda workload: 0)
    monkeypatch.setattr("skipway.inference.timer.time.perf_counter", clock)
    monkeypatch.setattr(
        runner, "time_interleaved", lambda *given, **named: time_interleaved(*given, **named, clock=clock)
    )
    given = {"precisions": ["bfloat16"], "peers": ["timm"] if find_spec("timm") else [], "networks": ["vit@4"]}
    if not given["peers"]:
        pytest.skip("timm is not installed")
    run_plan(tiny_plan(**given, modes=["eager"], heat=True), tmp_path)
    slower = 2.0
    for modes in (["autocast"], ["openvino", "optimize-torch"]):
        run_plan(tiny_plan(**given, modes=modes, heat=True), tmp_path)
    journal = run_plan(tiny_plan(**given, finalists=1), tmp_path)
    final = journal.races()[-1]
    assert final.stage == "final"
    assert final.names == ("timm autocast", "timm openvino", "skipway optimize-torch")
    text = markdown(journal)
    assert "| vit@4 | 2x32 |" not in text  # chains have a table of their own
    assert "infer vit@4 bfloat16 2x32, heat" in text
    assert "bfloat16, 4 pieces" in text or "float32, 4 pieces" in text
    assert [each.race.stage for each in deciding_results(journal)] == ["final"]
    # what was measured is not measured again
    before = len(journal.rows)
    run_plan(tiny_plan(**given, finalists=1), tmp_path)
    assert len(Journal(tmp_path).rows) == before + 1  # the machine
    with pytest.raises(SkipwayError, match="a heat has none"):
        tiny_plan(heat=True, finalists=2)


@pytest.mark.parametrize("name", ["openvino", "openvino-throughput", "traced", "channels-last-pieces"])
def test_peers_in_every_engine_compute_the_same(name):
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, images = make_model("skipway", "vit@4", 32).eval(), torch.randn(4, 3, 32, 32)
    call = MODES[name].ready(model, images, "float32", None)
    with torch.no_grad():
        for given in (images, images.flip(0)):
            assert torch.allclose(call(given), model(given), atol=1e-4)
        if name in ("openvino-throughput", "channels-last-pieces"):
            assert call.tried > 1
            again = MODES[name].ready(model, images, "float32", call.choice)
            assert (again.choice, again.tried) == (call.choice, 0)
            assert torch.allclose(again(images), model(images), atol=1e-4)


def test_at_equal_accuracy_a_precision_that_costs_too_much_takes_no_part(tmp_path):
    """Heats in bfloat16 count too; who was not looked at takes part in float32 alone."""
    journal, workload = Journal(tmp_path), Workload(network="net", what="infer", precision="any", batch=2, size=8)
    for precision, names in (("bfloat16", ("frozen-pieces", "traced")), ("any", ("openvino", "openvino-throughput"))):
        work = asdict(replace(workload, precision=precision))
        pace = pacemaker(replace(workload, precision=precision))
        given = {"library": "timm", "what": "infer", "named": precision == "any"}
        kinds = dict.fromkeys(names, "int8" if precision == "any" else "bfloat16")
        field_of = [pace, *(Contender(mode=name, precision=kind, **given) for name, kind in kinds.items())]
        journal.write({"kind": "race", "workload": work, "stage": "heat", "names": [*map(str, field_of)], "rounds": 1})
        for place, each in enumerate(field_of):
            row = {"workload": work, "name": str(each), "race": len(journal.of("race")) - 1}
            journal.write({"kind": "prepared", **row, **asdict(each), "side": each.side, "error": ""})
            journal.write(
                {"kind": "timing", **row, "round": 0, "seconds": 1.0 / (place + 1), "error": "", "dropped": ""}
            )
    about = {"kind": "accuracy", "network": "net", "reference": 96.0, "error": "", "trained": "x", "images": 592}
    for mode, precision, top1 in (
        ("frozen", "bfloat16", 95.5),
        ("openvino", "int8", 95.4),
        ("traced", "bfloat16", 90.0),
    ):
        journal.write({**about, "mode": mode, "precision": precision, "top1": top1})
    assert [str(each) for each in find_finalists(journal, workload, 2)] == ["timm frozen-pieces bfloat16"]
    journal.write({**about, "mode": "openvino", "precision": "int8", "top1": 96.2})
    names = [str(each) for each in find_finalists(journal, workload, 2)]
    assert names == ["timm frozen-pieces bfloat16", "timm openvino-throughput int8", "timm openvino int8"]
    assert "| net | x | 592 | traced | bfloat16 | 90.00 | 96.00 | more than allowed |" in markdown(journal)


def test_the_table_at_equal_accuracy_has_no_precision_that_costs_too_much(tmp_path):
    """Also where the accuracy was measured after the race, or nobody took the slow ones out before it."""
    recorded(tmp_path)
    path = tmp_path / "rows.jsonl"
    kinds = {"timm frozen": ("frozen", "int8"), "timm eager": ("eager", "float32")}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "workload" in row:
            row["workload"]["precision"] = "any"
        if row["kind"] == "prepared":
            row["mode"], row["precision"] = kinds.get(row["name"], ("eager", "float32"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = race_results(Journal(tmp_path))
    assert (found.best["peer"], found.best["ours"]) == ("timm eager", "skipway eager")
    assert "costs too much accuracy" in markdown(Journal(tmp_path))
    journal = Journal(tmp_path)
    about = {"kind": "accuracy", "network": WORKLOAD.network, "reference": 96.0, "error": "", "trained": "x"}
    journal.write({**about, "images": 592, "mode": "frozen", "precision": "int8", "top1": 95.6})
    (found,) = race_results(journal)
    assert found.best["peer"] == "timm frozen"


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"kind": "machine"}\nnonsense\n{"kind": "copy"}\n')
    with pytest.raises(SkipwayError, match="line 2: no JSON"):
        Journal(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modes": ["eagre"]}, "did you mean 'eager'"),
        ({"peers": ["keras"]}, "unknown peer 'keras'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"rounds": 0}, "rounds 0: the rule is at least 1"),
        ({"budget": 0.0}, "budget 0: the rule is more than 0 seconds"),
        ({"networks": ["swin@9"]}, "FAMILY@BRANCHES"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given, message):
    with pytest.raises(SkipwayError, match=message):
        tiny_plan(**given)


def test_our_switches_are_on_in_their_turns_and_off_between(tmp_path, monkeypatch):
    """With stand-ins for the allocator, the kernels and the backends."""
    import skipway.hardware.allocator as allocator
    import skipway.inference.optimized_model as optimized_model
    import skipway.surgery.acceleration as acceleration

    kept: list[str] = []

    @contextmanager
    def keep_memory():
        kept.append("on")
        yield
        kept.append("off")

    monkeypatch.setattr(allocator, "keep_memory", keep_memory)
    monkeypatch.setattr(acceleration, "accelerate", lambda model, example=None: kept.append("kernels"))
    monkeypatch.setattr(optimized_model, "optimize", lambda model, example, **how: model)
    before = torch.backends.mkldnn.matmul.fp32_precision
    modes = ["eager", "accelerate", "optimize-onnxruntime"]
    journal = run_plan(tiny_plan(what=["infer", "train"], modes=modes, switches=True), tmp_path)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert not [row for row in journal.of("prepared") + journal.of("timing") if row["error"]]
    assert kept.count("on") == kept.count("off") > 0
    assert "kernels" in kept
    names = {row["name"] for row in journal.of("timing") if not row["dropped"]}
    assert {"skipway eager + switches", "skipway accelerate + switches", "skipway optimize-onnxruntime"} <= names


def test_a_contender_says_what_it_is():
    assert str(Contender(library="skipway", mode="eager", what="infer", precision="float32")) == "skipway eager"
