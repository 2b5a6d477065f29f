"""Starting the training script through accelerate's launcher, as TRL does; TRL's own code is tied to `trl.scripts`."""

from pathlib import Path

from l2t_trl.errors import UserError
from l2t_trl.fields import module_path


LAUNCHER_OVERRIDES = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


def config_folders() -> list[Path]:
    """Return the folders with accelerate configurations, ours before TRL's."""
    package = Path(__file__).parent
    # In the installed package the folder lies inside, in a checkout beside it.
    candidates = (package / "accelerate_configs", package.parent / "accelerate_configs")
    return [*filter(Path.is_dir, candidates), module_path("trl", "accelerate_configs")]


def find_accelerate_config(name: str) -> Path:
    """
    Return the path of an accelerate configuration.

    Args:
        name (`str`):
            Path of a file, or name (without .yaml) of a configuration shipped here or with TRL.

    Raises:
        UserError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    names = set()
    for folder in config_folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
        names.update(entry.stem for entry in folder.glob("*.yaml"))
    raise UserError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(sorted(names))}.")


def launch(launch_args, argv: list[str]) -> int:
    """
    Run the training script under accelerate's launcher.

    Args:
        launch_args ([`~l2t_trl.scripts.train.LaunchArguments`]):
            Which configuration to launch with, and what to override in it.
        argv (`list[str]`):
            Arguments of `l2t train`; each process reads them again.

    Returns:
        `int`: exit code of the first process that failed, or 0.

    Raises:
        UserError: if that process has left one, by [`hand_to_launcher`].
    """
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--config_file", str(find_accelerate_config(launch_args.accelerate_config))]
    for name in LAUNCHER_OVERRIDES:
        value = getattr(launch_args, name)
        if value is not None:
            options += [f"--{name}", str(value)]
    launcher_args = launch_command_parser().parse_args([*options, "--module", "l2t_trl.scripts.train", *argv])
    try:
        launch_command(launcher_args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if isinstance(failure.message, dict):  # a text where the process has left nothing
            raise UserError(failure.message["message"].removeprefix("UserError: ")) from error
        return failure.exitcode
    return 0


def hand_to_launcher(error: UserError) -> bool:
    """
    Leave an error to [`launch`], which shows it once where each process would.

    Returns:
        `bool`: `False` where the process was started in a way that nobody would read it.
    """
    import os

    if not os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def end_process() -> None:
    """
    End a launched process whose work is done; on a machine without an accelerator, at once.

    Threads of gloo's or DeepSpeed's may outlive the process group there, and the C++ run-time aborts a process that ends
    while they run: a run that has succeeded would then count as failed.
    """
    import os
    import sys

    import torch

    if not torch.accelerator.is_available():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
