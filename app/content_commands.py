"""`gateway content`: what is kept of tenants' prompts and answers on this machine, and its deletion."""

from __future__ import annotations

import argparse
from pathlib import Path

from app import content_writer
from app.ambient import Ambient
from app.operator import audit
from app.terminal import Command, fail


def add(command: Command) -> None:
    content = command("content", _list, "Prompts and answers that are kept for tenants who asked for it.")
    actions = content.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        made.add_argument("--folder", type=Path, required=True, help="gateway.content.folder of the replicas here")
        return made

    action("list", _list, "Whose content is kept here: tenant, files, bytes, first and last day.")
    delete = action("delete", _delete, "Delete all that is kept of a tenant here. On each replica's disk.")
    delete.add_argument("--tenant", required=True, help="whose")


def _list(arguments: argparse.Namespace) -> int:
    if not arguments.folder.is_dir():
        return _no_folder(arguments.folder)
    for tenant in sorted(path for path in arguments.folder.glob("*") if path.is_dir()):
        files = sorted(tenant.glob("*.jsonl"))
        if files:
            size = sum(file.stat().st_size for file in files)
            print(f"{tenant.name}\t{len(files)}\t{size}\t{files[0].name[:10]}\t{files[-1].name[:10]}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    if not arguments.folder.is_dir():
        return _no_folder(arguments.folder)
    try:
        files = content_writer.delete(arguments.folder, arguments.tenant)
    except (OSError, ValueError) as error:
        return fail(str(error))
    audit(Ambient(), "content.delete", tenant=arguments.tenant, files=files)
    print(f"Deleted {files} files of {arguments.tenant}.")
    return 0


def _no_folder(folder: Path) -> int:
    """A misspelt folder is not one that keeps nothing: nobody shall believe that it was deleted."""
    return fail(f"{folder} is no folder; --folder names gateway.content.folder of the replicas here.")
