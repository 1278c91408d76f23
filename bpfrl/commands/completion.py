"""``bpfrl completion``: what has a shell complete bpfrl's command lines."""

from __future__ import annotations

import click

from bpfrl.commands import completing


@click.command()
@click.argument("shell", type=click.Choice(completing.SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that has a shell complete bpfrl's command lines.

    It completes commands, options and values: the UIDs of pods that are limited or run on this node, cgroups, the
    kubeconfig's contexts, and what the cluster has of pods, namespaces and nodes where it answers within a second.

    \b
    FOR THIS SHELL
      bash  source <(bpfrl completion bash)
      zsh   source <(bpfrl completion zsh)
      fish  bpfrl completion fish | source

    \b
    FOR GOOD
      bash  bpfrl completion bash > /etc/bash_completion.d/bpfrl
      zsh   bpfrl completion zsh > /usr/local/share/zsh/site-functions/_bpfrl
      fish  bpfrl completion fish > ~/.config/fish/completions/bpfrl.fish

    bash reads that folder if the package bash-completion is there; without it, write the first line into ~/.bashrc.
    zsh must have run compinit.
    """
    click.echo(completing.script(context.find_root().command, shell), nl=False)
