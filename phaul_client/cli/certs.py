"""`phaul certs init|issue`: a CA and certificates of nodes, for those who have none."""

from pathlib import Path

import click

from phaul_client.cli.session import Session, command
from phaul_client.errors import InvalidRequest


@command("certs", "phaul certs init --ca ca", "phaul certs issue --ca ca --name node-a --out node-a")
@click.argument("action", type=click.Choice(["init", "issue"]))
@click.option(
    "--ca", type=click.Path(path_type=Path), required=True, help="Directory of the CA; keep it off the nodes."
)
@click.option("--name", default="", help="Name of the node.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for its files: phauld's --tls-dir.")
@click.option(
    "--days", type=click.IntRange(1, 36500), default=365, show_default=True, help="How long a node's is valid."
)
async def certs(session: Session, action: str, ca: Path, name: str, out: Path | None, days: int) -> None:
    """Make a CA (init), and with it the certificate of a node (issue)."""
    from phaul_client import certs as maker  # a library that no other command needs

    try:
        if action == "init":
            maker.make_ca(ca)
            session.show({"ca": str(ca)}, f"made a CA in {ca}")
        elif not name or out is None:
            raise InvalidRequest("issue needs --name and --out")
        else:
            maker.issue(ca, name, out, days)
            session.show({"name": name, "directory": str(out)}, _made(name, out))
    except OSError as exc:
        raise InvalidRequest(f"{exc.filename}: {exc.strerror}") from exc


def _made(name: str, directory: Path) -> str:
    policy = directory / "policy.toml"
    told = f"made the certificate of {name} in {directory}"
    return told if policy.exists() else f"{told}; phauld also wants {policy}, which says who may do what"
