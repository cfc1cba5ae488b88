"""`tfvllm report`: what an earlier compress run found."""

import json
import sys
from pathlib import Path

import click


@click.command("report", short_help="Show the report of a compress run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
@click.option("--open", "in_browser", is_flag=True, help="Open the HTML report in a browser.")
def command(run, as_json, in_browser):
    """Shows the report of the compress run in the folder RUN: tables on a terminal, plain lines elsewhere."""
    from tfvllm.compress import open_report
    from tfvllm.compress.report import summary_lines, terminal_summary

    page, content = open_report(run)
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(terminal_summary(content, run))
    else:
        click.echo("\n".join(summary_lines(content, run)))
    if in_browser:
        click.launch(str(page))
