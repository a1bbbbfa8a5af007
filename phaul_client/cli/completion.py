"""`phaul completion`: what makes a shell complete the commands, options and workloads of `phaul`."""

import click
from click.shell_completion import get_completion_class

from phaul_client.cli.session import Session, command


@command(
    "completion", 'eval "$(phaul completion bash)"', "phaul completion fish >~/.config/fish/completions/phaul.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
async def completion(session: Session, shell: str) -> None:
    """Print what makes a shell complete phaul's words.

    For bash and zsh, evaluate it in ~/.bashrc or ~/.zshrc; for fish, write it to a file as below.
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows all three
    root = click.get_current_context().find_root()
    script = made(root.command, {}, "phaul", "_PHAUL_COMPLETE").source()
    if shell == "fish":  # a help text may have commas of its own
        script = script.replace('string split ","', 'string split --max 1 ","')
    session.show({"shell": shell, "script": script}, script)
