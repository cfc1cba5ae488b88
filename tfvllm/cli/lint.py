"""`tfvllm lint DIR`: would a stock TF Serving load and serve this?"""

import json
from pathlib import Path

import click


@click.command("lint", short_help="Would a stock TF Serving load and serve this?")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--serving-version", metavar="V", help="TF Serving's version, such as 2.20 (the default).")
@click.option("--fix", is_flag=True, help="Apply safe fixes.")
@click.option("--static", is_flag=True, help="Read the files only; do not load the model or replay its warm-up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(directory, serving_version, fix, static, as_json):
    """Checks the SavedModel in DIR (or its highest version) for what keeps TF Serving from serving it, or from serving
    it well. Exit code 1 if it would not be served.
    """
    from tfvllm.quietly import import_tensorflow

    import_tensorflow(without_keras=True)
    from tfvllm.serving.lint import lint

    report = lint(directory, serving_version=serving_version, fix=fix, run=not static)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        for line in report.fixed:
            click.echo(f"fixed    {line}")
        for finding in report.findings:
            click.echo(f"{finding.severity:<8} {finding.code}: {finding.what}")
            click.echo(f"         at {finding.where}")
            click.echo(f"         fix: {finding.fix}")
        verdict = "would serve this" if report.ok else "would NOT serve this"
        click.echo(f"TF Serving {report.serving_version} {verdict}; target {report.target}, {_counts(report)}.")
    return 0 if report.ok else 1


def _counts(report) -> str:
    numbers = {kind: sum(f.severity == kind for f in report.findings) for kind in ("error", "warning", "note")}
    return ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in numbers.items())
