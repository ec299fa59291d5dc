"""The section `sparsity` of LightningCLI: how it composes, what a dump of it keeps, and that it does what callbacks do."""

import csv
import inspect
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    NMPattern,
    SparseExport,
    SparsityMonitor,
    STEPSparsityCallback,
    load_sparse,
)
from lightning_step.cli import SparsityCLI, main
from lightning_step.recipes import describe
from tests.net_of_a_user import BASE, NET

pytestmark = pytest.mark.filterwarnings("ignore")  # LightningCLI 2.6 calls what newer jsonargparse deprecates

EXPORT = {"path": "out/a.safetensors"}
AT = {"class_path": "lightning_step.AtStep", "init_args": {"step": 6}}


def recipe(name, **arguments):
    return {"class_path": f"lightning_step.{name}", **({"init_args": arguments} if arguments else {})}


RECIPES = [
    (recipe("Dense"), Dense()),
    (recipe("ASP", at=AT), ASP(AtStep(6))),
    (recipe("STE"), STE()),
    (recipe("SRSTE", lam=0.064), SRSTE(0.064)),
    (recipe("STEP", lam=0.016, switch=AT), STEP(AtStep(6), lam=0.016)),
]
MONITOR = {
    "every": 2,
    "histograms_every": 4,
    "per_layer": True,
    "text": False,
    "layout": False,
    "figure": False,
    "hparams": False,
    "metrics": ["val_loss"],
}
KEEP_NONE = ["--trainer.enable_checkpointing", "false"]
each_recipe = pytest.mark.parametrize(("said", "meant"), RECIPES, ids=[type(meant).__name__ for _, meant in RECIPES])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes configurations into the working directory and gives the words that read them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-step"])
    Path("net_of_a_user.py").write_text(NET)
    monkeypatch.delitem(sys.modules, "net_of_a_user", raising=False)

    def write(*sections, **more):
        bodies = [{**BASE, **more}, *({"sparsity": section} for section in sections)]
        for i, body in enumerate(bodies):
            Path(f"{i}.yaml").write_text(yaml.safe_dump(body))
        return [word for i in range(len(bodies)) for word in ("--config", f"{i}.yaml")]

    return write


def parsed(words, kind=SparsityCLI):
    return kind(subclass_mode_model=True, run=False, args=words)


def callback(cli, kind):
    [found] = [each for each in cli.trainer.callbacks if isinstance(each, kind)]
    return found


def defaults(kind):
    return {name: each.default for name, each in inspect.signature(kind).parameters.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_files_state_only_their_difference_and_the_command_line_wins(files):
    base, only_recipe = {"n": 2, "m": 8, "exclude": ["head"]}, {"recipe": recipe("STEP", lam=0.5)}
    words = files(
        base, only_recipe, {"export": EXPORT}, {"export": {"format": "packed"}}, {"recipe": {"init_args": {"lam": 1}}}
    )
    cli = parsed([*words, "--sparsity.n", "1", "--sparsity.export.module", "body", "--sparsity.recipe.scope", "all"])
    ours, export = callback(cli, STEPSparsityCallback), callback(cli, SparseExport)
    assert (ours.pattern, ours.recipe) == (NMPattern(1, 8), STEP(lam=1.0, scope="all"))
    assert ours._selection["exclude"] == ["head"]
    assert (export.path, export.format, export.module) == ("out/a.safetensors", "packed", "body")


def test_another_recipe_keeps_only_those_arguments_that_it_has_itself(files):
    words = files({"n": 1, "recipe": recipe("STEP", lam=0.5, form="paper")}, {"recipe": recipe("SRSTE")})
    ours = callback(parsed(words), STEPSparsityCallback)
    assert (ours.pattern, ours.recipe) == (NMPattern(1, 4), SRSTE(lam=0.5))  # as jsonargparse does with any class


@pytest.mark.parametrize("words", [[], ["--sparsity", "null"]], ids=["no section", "null"])
def test_without_the_section_the_run_is_dense(words, files):
    cli = parsed([*files(*([{"n": 1, "export": EXPORT}] if words else [])), *words])
    assert not [each for each in cli.trainer.callbacks if isinstance(each, (STEPSparsityCallback, SparseExport))]


def test_a_later_file_takes_the_export_away(files):
    cli = parsed(files({"n": 1, "export": EXPORT}, {"export": None}))
    assert callback(cli, STEPSparsityCallback).pattern == NMPattern(1, 4)
    assert not [each for each in cli.trainer.callbacks if isinstance(each, SparseExport)]


def test_the_section_takes_what_the_callbacks_take(files):
    section = parsed(files({"export": EXPORT})).config.sparsity
    export = section.pop("export")
    assert section.as_dict() == {
        name: each.default for name, each in inspect.signature(STEPSparsityCallback).parameters.items()
    }
    expected = {name: each.default for name, each in inspect.signature(SparseExport).parameters.items()}
    assert export.as_dict() == {**expected, **EXPORT}


def test_the_dump_test_names_every_argument_of_the_monitor():
    assert MONITOR.keys() == defaults(SparsityMonitor).keys()
    assert [name for name, value in defaults(SparsityMonitor).items() if MONITOR[name] == value] == []


@pytest.mark.parametrize(
    ("sections", "words", "on", "every"),
    [
        ([{}], [], True, None),
        ([{"monitor": False}], [], False, None),
        ([{"monitor": {"every": 5}}], [], True, 5),
        ([{"monitor": {"per_layer": True}}, {"monitor": {"every": 7}}], ["--sparsity.monitor.every", "9"], True, 9),
        ([{"monitor": {"every": 5}}, {"monitor": False}], [], False, None),
        ([{"monitor": False}], ["--sparsity.monitor.every", "3"], True, 3),
        ([{}], ["--sparsity.monitor", "false"], False, None),
    ],
)
def test_the_monitor_is_on_off_or_a_section_of_its_own(sections, words, on, every, files):
    cli = parsed([*files(*sections), *words])
    assert callback(cli, STEPSparsityCallback).monitor == on
    monitors = [each for each in cli.trainer.callbacks if isinstance(each, SparsityMonitor)]
    assert [each.options.every for each in monitors] == ([] if every is None else [every])
    if len(sections) == 2 and on:
        assert monitors[0].options.per_layer


@each_recipe
def test_a_dump_loses_nothing(said, meant, files, tmp_path):
    everything = {
        "n": 1,
        "m": 8,
        "recipe": said,
        "include": ["body", "head"],
        "exclude": ["head"],
        "overrides": {"body.0": [2, 4], "body.2": [1, 4]},
        "min_weights": 3,
        "total_steps": [12],
        "read_every": 5,
        "max_coordinates": 100,
        "verbose": False,
        "monitor": MONITOR,
        "keep_evaluation_weights": False,
        "export": {**EXPORT, "format": ["dense", "packed"], "path": "out/{format}", "module": "body", "which": "best"},
    }
    first = parsed(files(everything))
    dumped = tmp_path / "dump.yaml"
    dumped.write_text(first.parser.dump(first.config, skip_none=False))
    second = parsed(["--config", str(dumped)])
    assert second.config.sparsity == first.config.sparsity
    for cli in (first, second):
        ours, export = callback(cli, STEPSparsityCallback), callback(cli, SparseExport)
        assert describe(ours.recipe) == describe(meant)
        assert (ours.pattern, ours.total_steps, ours.verbose) == (NMPattern(1, 8), [12], False)
        assert ours.keep_evaluation_weights is False
        kept = {**ours._selection, **ours._sampling}
        assert kept == {name: everything[name] for name in kept}
        assert {name: getattr(export, name) for name in everything["export"]} == everything["export"]
        assert callback(cli, SparsityMonitor).options == SparsityMonitor(**MONITOR).options


@each_recipe
def test_what_is_printed_and_what_is_saved_give_the_same_run(said, meant, files, tmp_path, capsys):
    words = ["fit", *files({"recipe": said, "exclude": ["head"]}, {"export": {**EXPORT, "one_shot": True}})]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--print_config"])
    assert caught.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert main(words) == 0
    written = load_sparse("out/a.safetensors")
    assert (written["body.0.weight"].reshape(-1, 4) != 0).sum(1).tolist() == [2] * 16
    for config in ("printed.yaml", "out/run/version_0/config.yaml"):
        Path("out/a.safetensors").unlink()
        assert main(["fit", "--config", config]) == 0
        assert same(load_sparse("out/a.safetensors"), written)


@each_recipe
def test_the_section_trains_as_the_callback_does(said, meant, files):
    by_section = files({"n": 1, "recipe": said, "export": {**EXPORT, "one_shot": True}})
    assert main(["fit", *by_section]) == 0
    section = load_sparse("out/a.safetensors")
    listed = [
        {"class_path": "lightning_step.STEPSparsityCallback", "init_args": {"n": 1, "recipe": said}},
        {"class_path": "lightning_step.SparseExport", "init_args": {"path": "out/b.safetensors", "one_shot": True}},
    ]
    assert main(["fit", *files(trainer={**BASE["trainer"], "callbacks": listed})]) == 0
    assert same(load_sparse("out/b.safetensors"), section)


@each_recipe
def test_a_run_resumed_from_the_command_line_is_the_undisturbed_one(said, meant, files):
    if isinstance(meant, Dense):
        said = None  # a section with nothing to say trains as well: STEP by default
    section = {"total_steps": 16, "export": {**EXPORT, "one_shot": True}, **({"recipe": said} if said else {})}
    words = ["fit", *files(section), "--trainer.max_epochs", "4"]
    assert main(words) == 0
    undisturbed = load_sparse("out/a.safetensors")
    assert main([*words, "--trainer.max_epochs", "2"]) == 0
    assert not same(load_sparse("out/a.safetensors"), undisturbed)
    # The saved configuration of the run that stopped, and what is different now.
    config = ["fit", "--config", "out/run/version_1/config.yaml", "--trainer.max_epochs", "4"]
    assert main([*config, "--ckpt_path", "out/run/version_1/checkpoints/epoch=1-step=8.ckpt"]) == 0
    assert same(load_sparse("out/a.safetensors"), undisturbed)


def test_every_subcommand_sees_the_masked_weights(files, capsys):
    words = files({"recipe": recipe("STE"), "export": EXPORT})
    assert main(["fit", *words]) == 0
    import net_of_a_user

    plain = load_sparse("out/a.safetensors", net_of_a_user.Net())
    [batch] = plain.val_dataloader()
    expected = pytest.approx((plain(batch) - batch[:, :4]).square().mean().item(), rel=1e-5)
    again = ["--config", "out/run/version_0/config.yaml", "--ckpt_path"]
    checkpoint = "out/run/version_0/checkpoints/epoch=2-step=12.ckpt"
    for number, (command, name) in enumerate([("validate", "val_loss"), ("test", "test_loss")], start=1):
        assert main([command, *again, checkpoint]) == 0
        assert losses(Path(f"out/run/version_{number}"), name) == [expected]
    capsys.readouterr()
    assert main(["predict", *again, checkpoint]) == 0
    assert float(capsys.readouterr().out.split("predicted ")[1].split()[0]) == expected


@pytest.mark.parametrize(
    ("section", "words", "status", "error"),
    [
        ({"n": 5}, [], 1, "PatternError: Expected 1 <= n <= m, but got n=5 and m=4. n is"),
        ({"exclude": ["heda"]}, [], 1, "TargetError: Expected every glob of `exclude` to match a module or a tensor"),
        ({"recipe": recipe("SRSTE", lam=-1.0)}, [], 1, "ConfigurationError: Expected `lam` >= 0, but got -1.0."),
        ({"total_steps": 0}, [], 1, "ConfigurationError: Expected `total_steps` >= 1"),
        ({"export": {"path": "."}}, [], 1, "ConfigurationError: Expected `path` to name a file, but got the folder '.'"),
        ({"export": {**EXPORT, "which": "best"}}, KEEP_NONE, 1, "ConfigurationError: Expected a Mod"),
        ({"recipe": recipe("SRSTE", lamb=1)}, [], 2, "sparsity.recipe (SRSTE): Option 'lamb' is not accepted. See --sp"),
        ({}, ["--sparsity.recipe", "STE", "--sparsity.recipe.lam", "1"], 2, "sparsity.recipe (STE): Option 'lam' is not a"),
        ({"k": 1}, [], 2, "sparsity: Option 'k' is not accepted. See --sparsity.help."),
        ({"n": "two"}, [], 2, "sparsity.n: Expected int. Got value: two."),
        (124, [], 2, "sparsity: Expected arguments below it, or null, but got 124."),  # what YAML makes of 2:4
        ({"recipe": "SRSTEP"}, [], 2, "sparsity.recipe: Expected a dot import path string: SRSTEP."),
        ({"export": {"format": "packed"}}, [], 2, "sparsity.export: the following arguments are required: path."),
        ({"export": {**EXPORT, "format": "onnx"}}, [], 2, "sparsity.export.format: Expected a typing.Literal['dense',"),
    ],
)  # fmt: skip
def test_an_error_in_the_section_is_one_line(section, words, status, error, files, capsys):
    arguments = ["fit", *files(section), *words]
    if status == 1:
        assert main(arguments) == 1
    else:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    said = capsys.readouterr().err
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {error}")
    assert said.endswith(f"{line}\n")
    assert "usage:" not in said


def test_other_errors_are_told_as_ever(files, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", *files({}), "--trainer.max_epochs", "many"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "usage:" in said
    assert 'Parser key "trainer.max_epochs"' in said


@pytest.mark.parametrize(
    ("listed", "arguments", "refused"),
    [
        ("STEPSparsityCallback", {"n": 1}, True),
        ("SparseExport", EXPORT, True),
        ("SparseExport", {"path": "out/b.safetensors"}, False),
        ("SparsityMonitor", {"every": 3}, True),
    ],
)
def test_the_same_callback_in_both_places_is_refused(listed, arguments, refused, files, capsys):
    callbacks = [{"class_path": f"lightning_step.{listed}", "init_args": arguments}]
    section = {"recipe": recipe("STE"), "export": EXPORT, "monitor": {"every": 2}}
    words = files(section, trainer={**BASE["trainer"], "callbacks": callbacks})
    assert main(["fit", *words]) == int(refused)
    if refused:
        error = f"error: ConfigurationError: Expected {listed} in one place, but got it in `trainer.callbacks` and by"
        assert capsys.readouterr().err.splitlines()[-1].startswith(error)
    else:
        assert same(load_sparse("out/a.safetensors"), load_sparse("out/b.safetensors"))


class OfAUser(LightningCLI):
    """Knows nothing of sparsity, and calls no super."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--notes", default="none")

    def instantiate_trainer(self, **kwargs):
        return super().instantiate_trainer(callbacks=[LearningRateMonitor()], **kwargs)


class Derived(SparsityCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--notes", default="none")


class Mixed(OfAUser, SparsityCLI):
    pass


@pytest.mark.parametrize("kind", [Derived, Mixed])
def test_a_command_line_of_ones_own_has_the_section(kind, files):
    cli = parsed([*files({"export": EXPORT}), "--sparsity.n", "1", "--notes", "mine"], kind)
    assert callback(cli, STEPSparsityCallback).pattern == NMPattern(1, 4)
    assert callback(cli, SparseExport).path == EXPORT["path"]
    assert cli.config.notes == "mine"
    assert bool([each for each in cli.trainer.callbacks if isinstance(each, LearningRateMonitor)]) == (kind is Mixed)


def test_callbacks_that_are_always_there_stay(files):
    class Always(SparsityCLI):
        def __init__(self, **kwargs):
            super().__init__(trainer_class=Trainer, trainer_defaults={"callbacks": LearningRateMonitor()}, **kwargs)

    cli = parsed(files({}), Always)
    assert callback(cli, LearningRateMonitor)
    assert callback(cli, STEPSparsityCallback)


def test_the_module_names_nothing_else_lazily():
    import lightning_step.cli

    with pytest.raises(AttributeError, match=r"module 'lightning_step.cli' has no attribute 'Sparsity'"):
        lightning_step.cli.Sparsity  # noqa: B018
