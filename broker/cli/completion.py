"""`broker completion`: prints what a shell needs to complete commands and options."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    r"""Print the completion script for SHELL.

    \b
    bash:  eval "$(broker completion bash)"                      in ~/.bashrc
    zsh:   eval "$(broker completion zsh)"                       in ~/.zshrc, after compinit
    fish:  broker completion fish > ~/.config/fish/completions/broker.fish
    """
    from click.shell_completion import BashComplete, get_completion_class

    from broker.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, "broker", "_BROKER_COMPLETE")
    # click's own source() runs bash to ask its version, and complains where it is older than 4.4.
    click.echo(script.source_template % script.source_vars() if isinstance(script, BashComplete) else script.source())
