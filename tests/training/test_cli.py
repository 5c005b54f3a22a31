"""vaetrain as a user types it: real processes, real folders, errors in one line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.bundle.files import open_bundle
from service.inference.verification import verify_bundle
from tests.training.finished import finished_run
from training.cli import _configure, _vaeserve, app, main
from training.config import presets, summary_of
from training.data.batches import steps_per_epoch
from training.errors import ConfigError
from training.runs import Run, default_name

ROOT = Path(__file__).parents[2]
SMALL = ["--set", "model.latent_dim=2", "--set", "model.network.hidden=[16]", "--set", "optimiser.epochs=2"]
QUICK = [
    *SMALL,
    "--set",
    "run.validate_every=1",
    "--set",
    "run.threads=1",
    "--set",
    "evaluate.k=4",
    "--set",
    "score.k=2",
]


def command(*words):
    return [sys.executable, "-W", "error", "-m", "training.cli", *map(str, words)]


def environment():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the environment is activated
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def process(words, cwd):
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=280)


def vaetrain(*words, cwd):
    """The command in this process, which has torch loaded already."""
    before = Path.cwd()
    os.chdir(cwd)
    try:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module")
def fitted(workplace):
    return process(command("fit", *QUICK), workplace)


def test_fit_ends_with_a_bundle_that_verifies_and_the_command_that_serves_it(fitted, workplace):
    assert fitted.returncode == 0, fitted.stderr
    assert fitted.stdout.splitlines() == ["exported/digits/1", "serve it: vaeserve serve"]
    assert verify_bundle(workplace / "exported/digits/1").ok
    for stage in ("1,797 images 1×8×8", "fit: ", "evaluate: ", "export: ", "calibrate: ", "report: ", "publish: "):
        assert stage in fitted.stderr
    assert "Warning" not in fitted.stderr
    assert "Traceback" not in fitted.stderr


def test_the_runs_folder_alone_is_enough_for_each_stage(fitted, workplace):
    first = open_bundle(workplace / "exported/digits/1")
    for stage, *options in (["evaluate", "--k", "4"], ["export"], ["calibrate"], ["report"]):
        done = vaetrain(stage, "runs/digits", *options, cwd=workplace)
        assert done.exit_code == 0, done.stderr
    done = vaetrain("publish", "runs/digits", "--to", "other place", "--version", "4", cwd=workplace)
    bundle, serve = done.stdout.splitlines()
    assert bundle == "other place/digits/4"
    assert serve.endswith("vaeserve serve --repository 'other place'")
    again = open_bundle(workplace / "other place/digits/4")
    for name in ("encoder.onnx", "decoder.onnx", "joint.onnx", "reference.npz", "calibration.npz"):
        assert again.manifest.files[name] == first.manifest.files[name], name
    assert again.manifest.provenance.metrics == first.manifest.provenance.metrics


def test_the_card_gives_the_command_that_was_typed(fitted, workplace):
    text = (workplace / "exported/digits/1/README.md").read_text()
    assert " ".join(["vaetrain fit --preset digits", *(f"--set {word!r}" if "[" in word else f"--set {word}"
                     for word in QUICK if word != "--set")]) in text  # fmt: skip


def test_a_finished_run_is_not_trained_again_and_another_configuration_is_refused(fitted, workplace):
    before = (workplace / "runs/digits/checkpoint.pt").read_bytes()
    again = vaetrain("fit", *QUICK, "--fit-only", cwd=workplace)
    assert again.exit_code == 0, again.stderr
    assert again.stdout == ""
    other = vaetrain("fit", *QUICK, "--set", "seed=1", "--fit-only", cwd=workplace)
    assert_one_line(other, "seed: 0 -> 1")
    assert "--restart" in other.stderr
    assert Run.open(workplace / "runs/digits").config.seed == 0
    restarted = vaetrain("fit", *QUICK, "--set", "seed=1", "--fit-only", "--restart", cwd=workplace)
    assert restarted.exit_code == 0, restarted.stderr
    assert Run.open(workplace / "runs/digits").config.seed == 1
    assert not (workplace / "runs/digits/bundle").exists()
    assert (workplace / "runs/digits/checkpoint.pt").read_bytes() != before


def fit_pictures(folder, *options):
    """A short fit of 60 pictures in folder/"My Widgets", beside which lies a file that is none."""
    pictures = folder / "My Widgets"
    pictures.mkdir()
    for i in range(60):
        pixels = np.random.RandomState(i).randint(0, 256, (9, 7, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no image")
    conv = ["--set", "model.network.channels=[4]", "--set", "score.k=2", "--set", "evaluate.k=2"]
    done = vaetrain("fit", "--data", pictures, *SMALL, *conv, *options, cwd=folder)
    assert done.exit_code == 0, done.stderr
    return done.stderr


def test_a_folder_of_images_needs_a_name_only(tmp_path):
    said = fit_pictures(tmp_path, "--fit-only")
    assert "skipped" in said
    assert "broken.png" in said
    run = Run.open(tmp_path / "runs/my-widgets")
    assert (run.name, run.model.shape) == ("my-widgets", (3, 9, 7))


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_bundle(tmp_path):
    fit_pictures(tmp_path, "--to", tmp_path / "out")
    bundle = open_bundle(tmp_path / "out/my-widgets/1")
    assert bundle.manifest.signature.shape == (3, 9, 7)
    assert b"pytest" not in (tmp_path / "out/my-widgets/1/manifest.json").read_bytes()


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(tmp_path):
    words = ["fit", *QUICK, "--set", "optimiser.epochs=100000", "--set", "optimiser.patience=100000"]
    training = subprocess.Popen(
        command(*words), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (line := training.stderr.readline()).startswith("epoch 2 "):
        assert line, "the training ended by itself"
    training.send_signal(signal.SIGINT)
    _, said = training.communicate(timeout=60)
    assert training.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(
        "vaetrain: stopped; what was done is kept, the same command goes on: vaetrain fit"
    )
    assert (tmp_path / "runs/digits/checkpoint.pt").is_file()
    assert_one_line(vaetrain("export", "runs/digits", cwd=tmp_path), "no finished training")


def test_under_torchrun_one_process_does_what_follows_the_fit(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = process([*torchrun, "-m", "training.cli", "fit", *QUICK, "--set", "run.devices=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["exported/digits/1", "serve it: vaeserve serve"]
    assert done.stderr.count("fit: best") == 1
    assert [path.name for path in (tmp_path / "exported/digits").iterdir()] == ["1"]
    run = Run.open(tmp_path / "runs/digits")
    epoch = steps_per_epoch(len(run.dataset.splits["train"]), run.config.optimiser.batch_size, world_size=2)
    assert run.checkpoint["state"]["step"] == 2 * epoch, "each process had half of the images"


def assert_one_line(done, text):
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 or all("Error" not in line for line in lines), done.stderr
    assert lines[-1].startswith("vaetrain: ")
    assert text in lines[-1]
    assert "Traceback" not in done.stderr


def test_the_entry_point_ends_with_code_2_and_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["vaetrain", "evaluate", "nowhere"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # main would set it
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said, told = capfd.readouterr()
    assert said == ""
    assert told.startswith("vaetrain: nowhere is no run")


@pytest.mark.slow
def test_the_process_itself_ends_with_code_2_and_no_traceback(tmp_path):
    done = process(command("evaluate", "nowhere"), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vaetrain: nowhere is no run")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fit", "--set", "model.latent_dims=3"], "did you mean 'model.latent_dim'?"),
        (["fit", "--set", "model.latent_dim=none", "--set", "seed=x"], "seed"),
        (["fit", "--data", "no/such/folder"], "no such file or folder"),
        (["fit", "--preset", "minst"], "did you mean 'mnist'?"),
        (["evaluate", "nowhere"], "nowhere is no run"),
        (["fit", "--run-dir", "/proc/1/no"], "/proc/1/no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_exit_code_2(words, text, tmp_path):
    assert_one_line(vaetrain(*words, cwd=tmp_path), text)


def test_a_damaged_staged_bundle_is_named(tmp_path):
    run = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2})
    run.staged.mkdir(parents=True)
    (run.staged / "manifest.json").write_text("{}")
    assert_one_line(vaetrain("calibrate", run.folder, cwd=tmp_path), "format_version")


def test_help_is_quick_because_torch_is_not_loaded(tmp_path):
    code = (
        "import sys, training.cli\n"
        "try: training.cli.app(['fit', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'lightning', 'onnx', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    done = process([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    for flag in ("--data", "--preset", "--name", "--set", "--data-dir", "--run-dir", "--restart", "--to", "--fit-only"):
        assert flag in done.stdout
    assert "VAETRAIN_DATA_DIR" in done.stdout


def test_presets_are_listed(tmp_path):
    done = vaetrain("presets", cwd=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()] == presets()
    assert "ladder-gpu          Dynamically binarised MNIST, nine stochastic layers at 14×14, 7×7" in done.stdout
    assert "one deviation a feature and place from z.\n" in done.stdout, "a sentence of two lines is whole"
    assert "Two minutes of one CPU core" not in done.stdout, "and is the first one only"


def test_every_preset_begins_with_a_sentence():
    for name in presets():
        assert re.fullmatch(r"[A-Za-z][^#]{20,}\.", summary_of(name)), name


def test_the_command_that_serves_is_found_from_the_current_folder(tmp_path, monkeypatch):
    own = tmp_path / "env" / "bin" / "vaeserve"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert _vaeserve() == "env/bin/vaeserve"
    monkeypatch.chdir("/")
    assert _vaeserve() == str(own.relative_to("/"))
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("PATH", str(own.parent))
    assert _vaeserve() == "vaeserve"
    own.unlink()
    assert _vaeserve() == "vaeserve"
    assert {"digits", "mnist", "fashion-mnist", "images"} <= set(presets())


@pytest.mark.parametrize(
    ("data", "preset", "expected"),
    [
        (None, None, ("digits", "digits")),
        ("mnist", None, ("mnist", "mnist")),
        ("some/folder", None, ("images", "some/folder")),
        ("some/array.npy", None, ("images", "some/array.npy")),
        (None, "mnist", ("mnist", "mnist")),
        ("fashion-mnist", "mnist", ("mnist", "fashion-mnist")),
    ],
)
def test_the_preset_follows_the_data(data, preset, expected):
    launch, config = _configure(data, preset, None, [], None)
    assert (launch.preset, config.data.source) == expected


def test_flags_go_over_the_preset_and_set_goes_over_flags(tmp_path):
    _, config = _configure("mnist", None, "mine", ["name='other'", "model.latent_dim=7"], tmp_path)
    assert (config.name, config.model.latent_dim, config.data.directory) == ("other", 7, tmp_path)
    with pytest.raises(ConfigError, match=re.escape("unknown key 'nam'")):
        _configure(None, None, None, ["nam=x"], None)


@pytest.mark.parametrize(
    ("source", "name"),
    [("mnist", "mnist"), ("a/b/My Cats/", "my-cats"), ("x/set.v2", "set.v2"), ("x/Set.NPZ", "set"), ("/", "images")],
)
def test_default_names(source, name):
    assert default_name(source) == name


def test_a_training_that_ends_while_annealing_tells_the_bound_of_its_last_epoch(tmp_path):
    """Its bounds are of other objectives and none is the best: minus infinity is nobody's bound."""
    words = [*QUICK, "--set", "objective.warmup_epochs=10", "--run-dir", "run", "--fit-only"]
    said = vaetrain("fit", "--data", "digits", *words, cwd=tmp_path).stderr
    bound = re.search(r"^epoch 2 .* validation bound (-\d+\.\d{3})", said, re.MULTILINE)[1]
    assert f"fit: {bound} nats on validation at the last epoch, 2; the annealing had not ended" in said
