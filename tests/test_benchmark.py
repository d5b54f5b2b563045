"""The benchmark: fair turns, ratios pair by pair, an honest floor, both sides doing the same work, clear refusals."""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import torch

from jaxnets import benchmark, benchmark_jax, benchmark_report, benchmark_torch, benchmark_worker, cores, machine
from jaxnets.benchmark import Race, floor_of, task_of
from jaxnets.benchmark_worker import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Worker
from jaxnets.errors import UserError
from jaxnets.torch_nets import NETS
from tests.slow import slow_after
from tests.test_models import PARAMETERS
from tests.tiny_net import TinyNet

RATES = {"copy_bytes_per_second": 1e10, "flops_per_second": 1e11}


class FakeWorker:
    """A contender that takes as long as told in a round's turns, ten times that in the last; notes who was asked."""

    def __init__(self, name, step_seconds, log, parameters):
        self.name, self.step_seconds, self.log, self.parameters = name, step_seconds, log, parameters
        self.turns = 0

    def ask(self, question, **details):
        if question == "hello":
            return {"idle_bytes": 100}
        if question == "prepare":
            report = {
                "compile_seconds": 1.0,
                "first_step_seconds": 2.0,
                "temp_bytes": None,
                "ready_bytes": 400,
                "form": "fake",
            }
            return report | {"parameters": self.parameters, "dtype": "float32"}
        self.log.append(self.name)
        # The first turn measures how many steps to take.
        round_number, turn = divmod(max(0, self.turns - 1), benchmark.TURNS)
        seconds = self.step_seconds[min(round_number, len(self.step_seconds) - 1)]
        seconds *= 10 if turn == benchmark.TURNS - 1 else 1
        self.turns += 1
        return {"seconds": seconds * details["steps"], "peak_bytes": 700, "device_peak_bytes": None}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.fixture
def fake_race(monkeypatch):
    """Race made-up contenders: name -> seconds a step by round; the result and the order of the turns."""

    def run(parameters=PARAMETERS["squeezenet1_1_cifar"], **step_seconds):
        log = []
        counts = dict.fromkeys(step_seconds, PARAMETERS["squeezenet1_1_cifar"]) | {"torch": parameters}
        monkeypatch.setattr(
            benchmark_worker, "start", lambda name: FakeWorker(name, step_seconds[name], log, counts[name])
        )
        monkeypatch.setattr(machine, "processor_ticks", lambda: (0, 0))
        task = task_of("squeezenet1_1_cifar", "eval")
        rounds = len(step_seconds["jaxnets"])
        return benchmark.run_race(Race(task, tuple(step_seconds)), rounds, RATES), log

    return run


def test_contenders_take_turns_and_alternate_who_begins(fake_race):
    _, log = fake_race(jaxnets=[1.0] * 3, torch=[1.0] * 3, flax=[1.0] * 3)
    turns = log[3:]  # after one turn each to choose the steps
    assert turns[:9] == ["jaxnets", "torch", "flax", "torch", "flax", "jaxnets", "flax", "jaxnets", "torch"]
    assert len(turns) == 3 * 3 * benchmark.TURNS


def test_ratios_are_taken_within_rounds(fake_race):
    # The machine slows down fourfold: medians apart would say 2, though in every round it is 3 or more.
    race, _ = fake_race(jaxnets=[1.0, 2.0, 4.0], torch=[3.0, 8.0, 12.0])
    assert race["ratios"]["torch"] == {"median": 3.0, "low": 3.0, "high": 4.0, "rounds": [3.0, 4.0, 3.0]}
    ours = race["contenders"]["jaxnets"]
    assert (ours["step_seconds"]["median"], ours["step_seconds"]["low"], ours["step_seconds"]["high"]) == (2, 1, 4)
    assert ours["images_per_second"] == 128 / 2


def test_turns_that_the_host_slows_are_taken_again(monkeypatch):
    """Of three tries the quietest counts where none is quiet, else the first that is."""
    monkeypatch.setattr(benchmark, "TURNS", 2)
    monkeypatch.setattr(benchmark, "TRIES", 3)
    ticks = iter([(0, 0), (50, 50), (50, 50), (140, 60), (140, 60), (200, 100), (200, 100), (298, 102)])
    monkeypatch.setattr(machine, "processor_ticks", lambda: next(ticks))
    worker = FakeWorker("jaxnets", [1.0], [], 0)
    numbers = itertools.count()
    monkeypatch.setattr(worker, "ask", lambda question, steps: next(numbers))
    taken, stolen = benchmark.take_turns({"jaxnets": worker}, {"jaxnets": 1}, rounds=1)
    assert taken == [[{"jaxnets": 1}, {"jaxnets": 3}]]
    assert stolen == pytest.approx((0.10 + 0.02) / 2)


def test_a_round_of_slow_steps_has_one_turn(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_SECONDS", 0.0)
    stolen = itertools.count()
    monkeypatch.setattr(machine, "processor_ticks", lambda: (0, next(stolen)))  # all of it
    worker = FakeWorker("jaxnets", [1.0], [], 0)
    taken, _ = benchmark.take_turns({"jaxnets": worker}, {"jaxnets": 1}, rounds=3)
    assert [len(turns) for turns in taken] == [1, 1, 1] and worker.turns == 3


def test_short_steps_fill_a_turn(fake_race):
    race, _ = fake_race(jaxnets=[0.003], torch=[0.4])
    steps = {name: entry["steps_per_turn"] for name, entry in race["contenders"].items()}
    assert steps["jaxnets"] in (67, 68) and steps["torch"] == 1


def test_another_number_of_parameters_is_no_race(fake_race):
    with pytest.raises(UserError, match="torch's squeezenet1_1_cifar has 5 parameters, ours 727,626"):
        fake_race(parameters=5, jaxnets=[1.0], torch=[1.0])


def test_tables_hold_what_was_measured(fake_race, capsys):
    race, _ = fake_race(jaxnets=[0.5, 0.5], torch=[1.0, 1.25])
    record = benchmark.describe_run(["benchmark"]) | {"device": "abacus", "rounds": 2, "rates": RATES, "races": [race]}
    benchmark_report.show(record, markdown=True)
    printed = capsys.readouterr().out
    assert "| squeezenet1_1_cifar | eval | 128x32px | torch | 500.0 | 1,125.0 | 2.25 | 2.00-2.50 |" in printed
    assert "abacus" in printed and "10.0 GB/s" in printed and "100 GFLOP/s" in printed
    assert ", PyTorch with OMP_PROC_BIND=true, THP_MEM_ALLOC_ENABLE=1;" in printed
    assert f"{race['floor']['seconds'] / 0.5:.0%}" in printed


def test_pytorch_has_what_the_user_says(monkeypatch):
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    for contender in ("torch", "torch_compile"):
        given = benchmark_worker.environment(contender)
        assert (given["OMP_PROC_BIND"], given["THP_MEM_ALLOC_ENABLE"]) == ("false", "1")
    assert "OMP_PROC_BIND" not in benchmark_worker.environment("jaxnets")


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("mobilenet_v2", "train", (64, 96)),
        ("mobilenet_v2", "latency", (1, 224)),
        ("mobilenet_v2_cifar", "eval", (128, 32)),
        ("mobilenet_v2_cifar", "latency", (1, 32)),
    ],
)
def test_default_sizes(name, mode, expected):
    task = task_of(name, mode)
    assert (task.batch_size, task.image_size) == expected


def test_the_nets_that_can_be_raced_are_those_of_the_pytorch_side():
    assert sorted(benchmark.TORCH_MODELS) == sorted(NETS)


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "squeezenet1_1"])
def test_floor_is_what_pytorchs_layers_move_and_multiply(name):
    moved = first = macs = first_macs = 0

    def count(module, inputs, output):
        nonlocal moved, first, macs, first_macs
        layer_macs = module.weight.numel() * output[0, 0].numel()
        if not macs:
            first, first_macs = inputs[0].numel(), layer_macs
        moved += inputs[0].numel() + output.numel()
        macs += layer_macs

    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    evaluation = floor_of(task_of(name, "eval", 8, 32), RATES, float_bytes=4)
    assert evaluation.bytes == 4 * (8 * moved + PARAMETERS[name])
    assert evaluation.flops == 2 * 8 * macs
    training = floor_of(task_of(name, "train", 8, 32), RATES, float_bytes=2)
    # No gradient of the images; parameters and momenta are read and written.
    assert training.bytes == 2 * 8 * (2 * moved - first) + 16 * PARAMETERS[name]
    assert training.flops == 2 * 8 * (3 * macs - first_macs)
    assert training.memory_seconds == pytest.approx(training.bytes / 1e10)
    assert training.seconds == max(training.bytes / 1e10, training.flops / 1e11)


def test_a_training_step_is_pytorchs_sgd():
    model, optimizer = TinyNet(num_classes=3), benchmark_jax.make_optimizer()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    labels = np.array([0, 1, 2, 1])
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
    variables = jax.tree.map(np.asarray, variables)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        logits, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def as_torch(tree):
        return [torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]

    expected = [value.requires_grad_() for value in as_torch(variables["params"])]
    sgd = torch.optim.SGD(expected, LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = benchmark_jax.make_train_step(model, optimizer)
    params = jax.tree.map(jax.numpy.array, variables["params"])
    state = params, jax.tree.map(jax.numpy.array, variables["batch_stats"]), optimizer.init(params), jax.random.key(2)
    for _ in range(3):  # with momentum the second step differs from the first
        loss, gradients = loss_of(jax.tree.map(np.asarray, state[0]))
        for value, gradient in zip(expected, as_torch(gradients)):
            value.grad = gradient
        sgd.step()
        state, raced_loss = step(state, images, labels)
        assert float(raced_loss) == pytest.approx(float(loss), rel=1e-5)
    for value, raced in zip(expected, as_torch(state[0])):
        np.testing.assert_allclose(raced, value.detach(), rtol=1e-5, atol=1e-6)
    means = [np.asarray(leaf) for leaf in jax.tree.leaves(state[1])]
    assert any(not np.array_equal(a, b) for a, b in zip(means, jax.tree.leaves(variables["batch_stats"])))


def test_pytorch_trains():
    task = dataclasses.replace(task_of("squeezenet1_1_cifar", "train", 2), threads=1)
    net = NETS[task.model]()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    step = benchmark_torch._train_step(net, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    losses = [float(step()) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_pytorch_races_in_its_fastest_form(monkeypatch):
    """Asked as its process is: what it answers is JSON."""
    monkeypatch.setattr(benchmark_torch, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(benchmark_torch, "TRIAL_ROUNDS", 1)
    task = dataclasses.replace(task_of("squeezenet1_1_cifar", "latency"), threads=1)
    prepare = functools.partial(benchmark_torch.prepare, compiled=False, cores=cores.usable())
    asked = [{"question": "rates", "threads": 1}, {"question": "prepare"} | dataclasses.asdict(task)]
    asked.append({"question": "turn", "steps": 2})
    answers = io.StringIO()
    benchmark_worker.serve(prepare, lambda threads: {"threads": threads}, map(json.dumps, asked), answers)
    rates, report, turn = map(json.loads, answers.getvalue().splitlines())
    assert rates == {"threads": 1}
    tried = report["tried"]
    assert set(tried) == {a + b for a in ("channels_last", "NCHW") for b in ("", ", fused", ", TorchScript")}
    assert report["form"] == min(tried, key=tried.get)
    assert report["parameters"] == PARAMETERS["squeezenet1_1_cifar"]
    assert turn["seconds"] > 0


def test_a_form_is_as_fast_as_its_fastest_round(monkeypatch):
    seconds = {"a": [3.0, 1.0, 9.0], "b": [2.0, 2.5]}

    def attempt(make, net, cores):
        name = make()
        return name, benchmark_torch.Trial(1.0, seconds[name].pop(0), 0, torch.zeros(1))

    monkeypatch.setattr(benchmark_torch, "_forms", lambda *_: {name: lambda name=name: name for name in seconds})
    monkeypatch.setattr(benchmark_torch, "_try", attempt)
    task = dataclasses.replace(task_of("squeezenet1_1_cifar", "latency"), threads=1)
    report = benchmark_torch.prepare(task, compiled=False, cores=cores.usable()).report
    assert (report["form"], report["tried"]) == ("a", {"a": 1.0, "b": 2.0})


@pytest.mark.parametrize("side", [benchmark_jax, benchmark_torch])
def test_rates_count_what_is_copied_and_multiplied(side, monkeypatch):
    def half_a_second(call, wait):
        wait(call())
        return 0.5

    monkeypatch.setattr(side, "fastest", half_a_second)
    found = side.rates(threads=1)
    assert (found["copy_bytes_per_second"], found["flops_per_second"]) == (4 << 28, 4 * 2048**3)


@pytest.mark.parametrize(
    ("contenders", "copied", "libraries"),
    [(("jaxnets", "torch_compile"), 3.0, ["jax", "torch"]), (("jaxnets", "flax"), 1.0, ["jax"])],
)
def test_the_best_rates_of_the_libraries_that_race_count(contenders, copied, libraries, monkeypatch):
    numbers = {"jaxnets": (1.0, 8.0), "torch": (3.0, 6.0)}
    rates = {name: dict(zip(("copy_bytes_per_second", "flops_per_second"), pair)) for name, pair in numbers.items()}

    def start(name):
        worker = FakeWorker(name, [], [], 0)
        monkeypatch.setattr(worker, "ask", lambda question, threads: rates[name])
        return worker

    monkeypatch.setattr(benchmark_worker, "start", start)
    best, answers = benchmark.measure_rates(contenders)
    assert best == {"copy_bytes_per_second": copied, "flops_per_second": 8.0} and list(answers) == libraries


@pytest.mark.slow
def test_the_compiler_has_all_cores_though_openmp_binds_the_thread_that_asks(repository):
    code = """if True:
        import os
        from jaxnets import cores
        usable = cores.usable()
        from jaxnets import benchmark_torch
        import torch, torch._inductor.config
        torch.ones(1 << 20).sum()
        bound = os.sched_getaffinity(0)
        with benchmark_torch._unbound(usable):
            free = os.sched_getaffinity(0)
        print(len(usable), len(free), os.sched_getaffinity(0) == bound, torch._inductor.config.compile_threads)
    """
    worker = benchmark_worker.environment("torch_compile")
    printed = subprocess.run([sys.executable, "-c", code], cwd=repository, env=os.environ | worker, capture_output=True)
    count = str(len(cores.usable()))
    assert printed.stdout.decode().split() == [count, count, "True", count], printed.stderr


BAD = {
    "--models=mobilenet_v9": "there is no net 'mobilenet_v9'",
    "--models=": "there is no net ''",
    "--models=resnet18": "PyTorch's side has no 'resnet18'",
    "--mode=training": "'training' must be one of train, eval, latency",
    "--against=tensorflow": "'tensorflow' must be one of torch, torch_compile, flax",
    "--against=jaxnets": "'jaxnets' must be one of",
    "--rounds=0": "'0' is not a whole number of at least 1",
    "--batch_size=0": "'0' is not a whole number of at least 1",
    "--batch_size=1 --image_size=32 --models=mobilenet_v1": "--batch_size=1 leaves BatchNorm one value per channel in",
    "--image_size=0": "'0' is not a whole number of at least 1",
    "--image_size=5": "too small",
    "--format=yaml": "invalid choice: 'yaml'",
    "--out=nowhere/at/all.json": "must be a writable folder",
    "--model": "--model",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments_are_refused_before_any_work(argument, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark_worker, "start", lambda name: pytest.fail("work has begun"))
    with pytest.raises(UserError) as error:
        benchmark.main(["benchmark", *argument.split()])
    assert BAD[argument] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_race_that_fails_keeps_no_other_from_being_run(tmp_path, monkeypatch, capsys):
    def run_race(race, rounds, rates):
        if race.task.mode == "train":
            raise UserError("the process of torch ended by SIGKILL: it said nothing")
        return {"model": race.task.model, "mode": race.task.mode}

    rates = {"jax": {"about": {"device": "abacus"}}}
    monkeypatch.setattr(benchmark, "measure_rates", lambda contenders: (RATES, rates))
    monkeypatch.setattr(benchmark, "run_race", run_race)
    arguments = ["--models=squeezenet1_1_cifar", "--format=json", f"--out={tmp_path / 'out.json'}"]
    with pytest.raises(UserError, match="^1 of 3 races failed; the first: squeezenet1_1_cifar train: the process of"):
        benchmark.main(["benchmark", *arguments])
    record = json.loads((tmp_path / "out.json").read_text())
    assert [race["mode"] for race in record["races"]] == ["eval", "latency"] and len(record["failed"]) == 1
    assert record == json.loads(capsys.readouterr().out)


def test_results_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_worker, "start", lambda name: pytest.fail("work has begun"))
    out = tmp_path / "kept.json"
    out.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        benchmark.main(["benchmark", f"--out={out}"])
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('out of luck')", "the process of torch ended with status 1: out of luck"),
        ("raise ValueError('first line\\nlast line')", "with status 1: last line"),
        ("import os; os.kill(os.getpid(), 9)", "by SIGKILL: it said nothing"),
        (
            "import json, sys\nfrom jaxnets import benchmark_worker\n"
            "benchmark_worker.serve = lambda *_: json.loads('?', parse_int=print)\nbenchmark_worker.main('jaxnets')",
            "with status 1: JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        ),
    ],
)
def test_a_dead_process_is_named_with_its_last_words(program, words):
    with Worker("torch", [sys.executable, "-c", program]) as worker, pytest.raises(UserError) as error:
        worker.ask("hello")
    assert words in str(error.value)


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 12), (0.3, 5), (2.0, 5)])
def test_the_fastest_call_is_looked_for_no_longer_than_a_second(monkeypatch, seconds, calls):
    """Neither what warms up nor a slow one counts."""
    took, now = itertools.chain([5.0, 0.001, seconds * 1.5, seconds], itertools.repeat(seconds * 1.2)), [0.0]
    monkeypatch.setattr(benchmark_worker.time, "perf_counter", lambda: now[0])
    waited = []

    def call():
        now[0] += next(took)
        return "result"

    assert benchmark_worker.fastest(call, waited.append) == pytest.approx(seconds)
    assert waited == ["result"] * calls


def test_a_process_ends_with_its_worker():
    worker = Worker("x", [sys.executable, "-c", "import sys; print('{}', flush=True); sys.stdin.read()"])
    with worker:
        assert worker.ask("hello") == {}
        assert worker._process.poll() is None
    assert worker._process.returncode == 0


@pytest.fixture
def on_one_core():
    """The contenders' threads, which are bound, would wait for those of the tests beside this one."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("net", "against"), slow_after(1, [("mobilenet_v2_mini", "flax"), ("squeezenet1_1_cifar", "torch,flax")])
)
def test_the_command(net, against, tmp_path, repository, monkeypatch, capsys, on_one_core):
    for name, value in {"TURN_SECONDS": 0.02, "TURNS": 1, "TRIES": 1}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "measure_rates", lambda _: (RATES, {"jax": {"about": {"device": "abacus"}}}))
    for name, value in {"JAXNETS_OPS": "xla", "CUDA_VERSION": "13.0", "NVIDIA_REQUIRE_CUDA": "cuda>=13.0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(repository)
    out = tmp_path / "result.json"
    arguments = [f"--models={net}", "--mode=latency", f"--against={against}", "--rounds=1"]
    benchmark.main(["benchmark", *arguments, "--format=json", f"--out={out}"])
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text())
    assert record["environment"]["JAXNETS_OPS"] == "xla"
    assert not {"CUDA_VERSION", "NVIDIA_REQUIRE_CUDA"} & record["environment"].keys(), "what a container's image sets"
    assert {"jax", "torch", "flax"} <= set(record["versions"])
    (race,) = record["races"]
    entries = race["contenders"]
    assert list(entries) == ["jaxnets", *against.split(",")] and list(race["ratios"]) == against.split(",")
    assert (entries["jaxnets"]["form"], entries["flax"]["form"]) == ("operators: xla", "operators: reference")
    for entry in entries.values():
        assert 0 < entry["step_seconds"]["low"] <= entry["step_seconds"]["high"] < 1
        # Of an image's maps the largest has 2 MiB: neither momenta nor what was compiled are the steps' own. A little
        # of what was resident may have been given back since.
        assert entry["idle_bytes"] < entry["ready_bytes"] and -1e7 < entry["peak_bytes"] - entry["ready_bytes"] < 6e7
    # Nobody beats a floor of one image 100 times.
    assert entries["jaxnets"]["temp_bytes"] > 0
    assert 0 < race["floor"]["share"] < 100
