"""``gru submit``: a command as a job on a running Ray cluster, or as a manifest for a new one on Kubernetes."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from gru_core.errors import InputError
from pipelines import console
from pipelines.options import EXAMPLES, AddressOption, JobArgument, JsonOption, SubmitCommands, VerboseOption

submit_app = typer.Typer(cls=SubmitCommands, rich_markup_mode=None)


@submit_app.callback(invoke_without_command=True, epilog=f"Example: {EXAMPLES['submit']}")
def submit(
    ctx: typer.Context, address: AddressOption = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the log.")] = False,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="Print a RayJob for Kubernetes; submit nothing.")] = False,
    image: Annotated[str | None, typer.Option(metavar="IMAGE", help="kuberay: container image with gru.")] = None,
    pvc: Annotated[str | None, typer.Option(metavar="NAME", help="kuberay: volume claim that all pods mount.")] = None,
    mount: Annotated[str | None, typer.Option(metavar="PATH", help="kuberay: where; default /shared.")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="kuberay: Secret with variables; repeatable.")
    ] = None,
    working_dir: Annotated[str | None, typer.Option(metavar="URI", help="kuberay: .zip with the code.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="kuberay: memory of a pod, as 32Gi.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="kuberay: name of the RayJob.")] = None,
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="kuberay: its namespace.")] = None,
    as_json: JsonOption = False, verbose: VerboseOption = False,
) -> None:  # fmt: skip
    """Any of these as a job on a running Ray cluster."""
    console.quiet(verbose)
    if ctx.invoked_subcommand is None:
        raise InputError(f"submit: no command given, expected such as: {EXAMPLES['submit']}")
    pods = {
        "image": image, "pvc": pvc, "mount": mount, "secrets": tuple(secret or ()) or None, "working_dir": working_dir,
        "memory": memory, "name": name, "namespace": namespace,
    }  # fmt: skip
    given = {key: value for key, value in pods.items() if value is not None}
    if kuberay and (ctx.invoked_subcommand != "run" or address or no_wait):
        raise InputError("--kuberay: prints a manifest and reaches no cluster; not with --address, --no-wait or a JOB")
    if given and not kuberay:
        option = next(iter(given)).replace("secrets", "secret").replace("_", "-")
        raise InputError(f"--{option}: only with --kuberay")
    ctx.obj = {"address": address, "wait": not no_wait, "json": as_json, "kuberay": given if kuberay else None}


@submit_app.command("run", hidden=True, context_settings={"allow_interspersed_args": False})
def submit_run(ctx: typer.Context, arguments: Annotated[list[str], typer.Argument(metavar="COMMAND ...")]) -> None:
    """Submits the command line that follows, or prints its manifest."""
    given = ctx.obj
    if given["kuberay"] is not None:
        return _manifest(arguments, given)
    from pipelines import jobs, report

    console.run(
        given["json"],
        lambda say: jobs.submit(arguments, address=given["address"], wait=given["wait"], say=say),
        report.job,
    )


def _manifest(arguments: list[str], given: dict[str, object]) -> None:
    """YAML documents on standard output, and nothing else there; with ``--json`` one List of them."""
    from pipelines import kuberay

    with console.stdout_to_stderr(), console.Progress(sys.stderr) as say:
        documents = kuberay.manifest(arguments, kuberay.Options(**given["kuberay"]), say)  # type: ignore[arg-type]
    if given["json"]:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))
    else:
        print(kuberay.to_yaml(documents), end="")


@submit_app.command("status", epilog="Example: gru submit status raysubmit_123")
def submit_status(
    ctx: typer.Context, job: JobArgument, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """How a job is doing."""
    from pipelines import jobs, report

    address = address or ctx.obj["address"]
    console.run(as_json or ctx.obj["json"], lambda say: jobs.status(job, address=address), report.job)


@submit_app.command("stop", epilog="Example: gru submit stop raysubmit_123")
def submit_stop(
    ctx: typer.Context, job: JobArgument, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Stop a job."""
    from pipelines import jobs, report

    address = address or ctx.obj["address"]
    console.run(as_json or ctx.obj["json"], lambda say: jobs.stop(job, address=address), report.job)
