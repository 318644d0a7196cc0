"""Starts a program and tells how it failed: its command line, its settings, its errors in words."""

import difflib
import importlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import acetate
import data_prep
from acetate.cli import HELP, Program, conf
from acetate.commands import as_on_gpu, inherited, launched, runs
from acetate.commands.checks import check_settings, rule_of, settings_of
from acetate.commands.places import check_places
from acetate.commands.recorded import name_of, quoted, run_to_continue, value_of, with_recorded
from acetate.commands.rules import LITERAL, RULES
from acetate.commands.secrets import TABLE, find, hide, refuse_in_jobs, reveal, show_without_secrets
from acetate.console import printable
from acetate.redaction import scrub_logs, scrubbed
from acetate.settings import SettingError, shown

CONF = str(conf())
FULL_ERROR = "HYDRA_FULL_ERROR"  # environment: 1 makes Hydra raise errors
TRACEBACK = "ACETATE_TRACEBACK"  # environment: 1 shows where an error was raised, too
# Hydra's settings for all but runs, which have a folder and a log of their own
NO_RUN = ("hydra/job_logging=stdout", "hydra.output_subdir=null", "hydra.run.dir=.")
IN_WORDS = (ValueError, OSError, RuntimeError, ArithmeticError, ImportError, NotImplementedError)


Overrides = Sequence[str]


def start(program: Program, arguments: Overrides) -> Any:
    """Runs main(config) of a program's module with the settings of its config, as hydra.main does,
    and beyond it:

    A command that is given a run starts from the settings that the run recorded, and its own win.
    Prompts and other texts are taken to the letter. Every setting, and whether what it names is
    there, is checked before the module is imported. An error is one message without a traceback,
    unless HYDRA_FULL_ERROR=1 or ACETATE_TRACEBACK=1 asks for it or it is a fault of the program. A
    run that failed before it had trained leaves no folder. A folder conf/ where the command is
    started may hold configs of one's own beside those of acetate.
    """
    given = list(sys.argv)
    if set(HELP) & set(arguments):
        from acetate.commands.help import help_of

        return print(help_of(program, [text for text in arguments if not text.startswith("-")]))

    def job(config: DictConfig) -> Any:
        sys.argv = given  # what Lightning starts further processes with, and what loggers note
        try:
            config = reveal(config)
            with as_on_gpu(False):  # either value keeps the rule, and to ask torch takes seconds
                check_settings(program.short, config)
            check_places(program.short, config)
            return _imported(program).main(config)
        except Exception as error:
            _clear_up()
            if _traceback_asked():
                raise
            tell(error, program, arguments)
            if HydraConfig.get().mode == RunMode.RUN:
                raise SystemExit(1) from None
            error.told = True  # type: ignore[attr-defined]
            raise

    own_configs()
    sys.excepthook = show_without_secrets
    own = () if program.short == "train" else NO_RUN
    with _process_as_before():
        os.environ.setdefault(TRACEBACK, os.environ.get(FULL_ERROR, "0"))  # children are told
        os.environ[FULL_ERROR] = "1"  # errors come here, not to Hydra's own printer
        try:
            arguments = hide(arguments)
            sys.argv = [given[0], *own, *hide(command_line(program, arguments))]
            _check_secrets(program, sys.argv[1:])
            hydra.main(version_base=None, config_path=CONF, config_name=program.config)(job)()
        except Exception as error:
            if _traceback_asked():
                raise
            if not getattr(error, "told", False):
                tell(error, program, arguments)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


@contextmanager
def _process_as_before() -> Iterator[None]:
    """Gives this process its arguments and its environment back at the end."""
    arguments = sys.argv
    names = (FULL_ERROR, TRACEBACK, TABLE)
    held = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        sys.argv = arguments
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(held)


def _imported(program: Program) -> Any:
    """Imports the program's module and sets right what its imports set up."""
    module = importlib.import_module(program.module)
    configure_log(HydraConfig.get().job_logging)  # Lightning, when imported, sets its own
    scrub_logs()
    if launched("nodes") == 1 and "torch" in sys.modules:
        from acetate.torchrun import stay_on_this_machine

        stay_on_this_machine()
    return module


class OwnConfigs(SearchPathPlugin):
    """Adds a folder conf/ in the working directory to Hydra's search path, after acetate's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        mine = Path("conf").absolute()
        if mine.is_dir() and mine != Path(CONF):
            search_path.append("yours", f"file://{mine}")


def own_configs() -> None:
    """Lets Hydra find a user's configs, and Python the modules beside them that they name."""
    if OwnConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(OwnConfigs)
    if Path("conf").is_dir() and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


# The command line


def command_line(program: Program, arguments: Overrides) -> list[str]:
    """Returns Hydra's arguments for those of a user: for training also its folder, which is made
    here."""
    name = program.short
    many = "-m" in arguments or "--multirun" in arguments
    read = [to_the_letter(name, argument, many) for argument in arguments]
    own = [argument for argument in read if not argument.startswith("-")]
    if len(read) - len(own) > many:
        return read  # --help, --cfg, ...
    if program.inherits:
        read = [*getattr(inherited, program.inherits)(own), *read]
    if name != "train" and value_of(own, "resume") in (None, "null"):
        return read
    config = _settled(program, read, many)
    if not many and (
        run := run_to_continue(config.paths.outputs, config.get("name"), config.resume)
    ):
        read = with_recorded(run, read)
        if name != "train":
            read.append(f"paths.run={quoted(str(run))}")
        elif (
            config.resume != "last"
            and not str(config.resume).endswith(".ckpt")
            and value_of(own, "name") is None
        ):
            # a run's folder: it goes on there
            return [*read, f"hydra.run.dir={quoted(str(run.absolute()))}"]
        config = _settled(program, read, many)
    place = "hydra.sweep.dir" if many else "hydra.run.dir"
    if name != "train" or any(text.startswith(f"{place}=") for text in own):
        return read
    RULES["name"].check("name", config.name)
    folder = runs.sweep_folder if many else runs.run_folder
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    overrides = [text for text in read if not text.startswith(("-", "hydra."))]
    chosen = folder(config.paths.outputs, config.name, config.resume, overrides, now)
    return [*read, f"{place}={quoted(chosen)}"]


def _settled(program: Program, arguments: Overrides, many: bool) -> DictConfig:
    """Composes the config of a command line without what it sweeps over.

    Where a setting is unknown it may be one of the run that is resumed: only groups, the name and
    the paths are settled then.
    """
    own = [
        text
        for text in arguments
        if not text.startswith(("-", "hydra.", "hydra/")) and not (many and _sweeps(text))
    ]
    try:
        return composed(program.config, own)
    except HydraException:
        if value_of(own, "resume") in (None, "null"):
            raise
        return composed(
            program.config,
            [text for text in own if "." not in name_of(text) or text.startswith("paths.")],
        )


def _check_secrets(program: Program, arguments: Overrides) -> None:
    """Notes the secrets of the command, and refuses a sweep that would get any from a file."""
    find(arguments)
    if {"-m", "--multirun"} & set(arguments):
        fixed = [text for text in arguments if not text.startswith("-") and not _sweeps(text)]
        refuse_in_jobs(composed(program.config, fixed, hydra=True))


def _sweeps(argument: str) -> bool:
    return OverridesParser.create().parse_override(argument).is_sweep_override()


def composed(config_name: str, overrides: Sequence[str], hydra: bool = False) -> DictConfig:
    """Composes a config, also while Hydra runs a program. hydra: with Hydra's own settings, too."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(CONF, version_base=None):
            return compose(config_name, [*overrides], return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = running


def to_the_letter(name: str, argument: str, many: bool = False) -> str:
    """Returns the argument with its value in quotes where the setting takes text that Hydra would
    read as something else.

    many: jobs of a sweep, where a comma stands between values.
    """
    key, equals, value = argument.partition("=")
    if argument == "logger=null":
        return "~logger"  # Hydra knows no null for a group
    if not equals or argument.startswith("-") or value == "null":
        return argument
    path = key.lstrip("+").partition("@")[0]
    if path.rpartition(".")[2] in LITERAL:
        return f"{key}={quoted(value)}"
    try:
        override = OverridesParser.create().parse_override(argument)
        read = override.value()
        sweeps = override.is_sweep_override()
    except HydraException:
        return argument if value.startswith(("[", "{", "'", '"')) else f"{key}={quoted(value)}"
    rule = rule_of(name, path)
    if rule is None and sweeps and not many:
        return f"{key}={quoted(value)}"  # so that the error is that there is no such setting
    if rule is None or (sweeps and many) or rule.holds(read) or not rule.holds(value):
        return argument
    return f"{key}={quoted(value)}"


# Errors


def tell(error: BaseException, program: Program, arguments: Overrides) -> None:
    """Prints what went wrong, with the traceback where no text was meant for users."""
    if not _meant_for_users(error):
        show_without_secrets(type(error), error, error.__traceback__)
    said = printable(scrubbed(in_words(error, program.config, arguments)))
    print(f"{program.name}: {said}", file=sys.stderr, flush=True)


def in_words(
    error: BaseException, config_name: str = "config", arguments: Sequence[str] = ()
) -> str:
    """Returns the message for users."""
    if isinstance(error, InstantiationException):
        cause, place = error.__cause__, re.search(r"full_key: (\S+)", str(error))
        if cause is None:
            return _one_line(error)
        return f"{place[1]}: {cause}" if place else str(cause)
    inner: BaseException | None = error
    # it is wrapped where a reference led to it
    while inner is not None and not isinstance(inner, SettingError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None:
        error = inner
        default = _default(inner.name, config_name, arguments)
        said = "" if default in (None, inner.value) else f" The default is {shown(default)}."
        return f"{error}{said}"
    text = _one_line(error)
    if found := re.search(r"Could not override '([^']+)'\. To append", text):
        with as_on_gpu(False):  # the names are the same, and to ask torch takes seconds
            known = [*_defaults(config_name, arguments), *_groups(config_name)]
        return f"{found[1]} is no setting here{_nearest(found[1], known)}. --help lists them."
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*)", text
    ):
        options = found[3].partition(" Config search path")[0].split()
        return (
            f"{found[1]}={found[2]} is unknown{_nearest(found[2], options)}; there are "
            f"{', '.join(options)}."
        )
    return text or type(error).__name__


def _traceback_asked() -> bool:
    return os.environ.get(TRACEBACK) == "1"


def _one_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(
        line for line in lines if line and not line.startswith(("full_key:", "object_type="))
    )


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    ends = {path.rpartition(".")[2]: path for path in known}
    near = difflib.get_close_matches(name, known, 1) or [
        ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, 1)
    ]
    return f", the nearest is {near[0]}" if near else ""


def _default(name: str, config_name: str, arguments: Sequence[str]) -> Any:
    """Returns the value of a setting where only groups are chosen; None where it has none."""
    with as_on_gpu(False):  # of all others
        known = name in _defaults(config_name, arguments)
    value = OmegaConf.select(composed(config_name, _groups_of(arguments)), name) if known else None
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _groups_of(arguments: Sequence[str]) -> list[str]:
    """Returns those of the arguments that choose a group, such as experiment=."""
    places = ((text, Path(CONF) / text.lstrip("+").partition("=")[0]) for text in arguments)
    return [text for text, place in places if "=" in text and place.is_dir()]


def _defaults(config_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of a config where only its groups, such as experiment=, are chosen."""
    try:
        config = composed(config_name, _groups_of(arguments))
    except (HydraException, OmegaConfBaseException):
        return {}
    return {path: value for path, value, _ in settings_of("", config)}


def _groups(config_name: str) -> list[str]:
    """Returns the names of the groups that a config composes, `experiment`, `data`, ..."""
    text = (Path(CONF) / f"{config_name}.yaml").read_text()
    found = re.findall(r"^  - (?:optional )?/?(\w+): ", text, re.MULTILINE)
    return [*found, *(_groups("config") if "  - /config\n" in text else ())]


def _meant_for_users(error: BaseException) -> bool:
    """Returns whether somebody wrote the error's text for users: Hydra, the system, or this
    project's code."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        return _meant_for_users(cause) or "unexpected keyword argument" in str(cause)
    if isinstance(error, HydraException | OmegaConfBaseException | OSError):
        return True
    if not isinstance(error, IN_WORDS) or isinstance(error, LookupError | UnicodeError):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:  # of another process
        return True
    file = Path(last.tb_frame.f_code.co_filename)
    ours = (Path(acetate.__file__).parent, Path(data_prep.__file__).parent)
    return any(file == place or place in file.parents for place in ours)


def _clear_up() -> None:
    """Removes the folder of a run that is new and holds nothing but the notes of its start."""
    config = HydraConfig.get()
    # or it goes on, or is another rank's
    if config.mode == RunMode.MULTIRUN or config.output_subdir != runs.RECORD:
        return
    folder = Path(config.runtime.output_dir)
    notes = {runs.RECORD, runs.LOCK, runs.FINISHED, f"{config.job.name}.log"}
    if all(item.name in notes for item in folder.iterdir()):
        shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
