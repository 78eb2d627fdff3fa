"""`broker broadcast` and `broker listen`: send to whoever listens, and listen."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from broker.cli.connection import broker_options, grace_option, print_json, read_json, run
from broker.cli.exits import Exit, Failure
from broker.client.async_client import AsyncClient, Subscription
from broker.client.subscription import Message
from broker.peer.values import encode
from broker.wire.attachments import expand


@click.command()
@click.argument("endpoint", required=False)
@click.argument("data", metavar="[JSON]", required=False)
@click.option("--topic", help="Only to the subscribers of this topic.")
@click.option("--to", metavar="PEER", help="Only to this peer.")
@click.option("--all", "to_all", is_flag=True, help="To everybody; then give JSON only.")
@broker_options
def broadcast(
    endpoint: str | None, data: str | None, topic: str | None, to: str | None, to_all: bool, url: str | None,
    token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Send JSON (- reads it from standard input) to everybody who listens to ENDPOINT."""
    if to_all:
        if data is not None or topic or to:
            raise Failure(Exit.USAGE, "--all goes to everybody: give JSON, and neither endpoint nor --topic nor --to")
        endpoint, data = None, endpoint
    elif endpoint is None and to is None:
        raise Failure(Exit.USAGE, "to whom? Give an ENDPOINT, --to PEER or --all (see 'broker broadcast --help')")
    value = read_json(data)
    told = run(lambda client: client.publish(endpoint, value, topic=topic, to=to), url, token, as_json)
    if as_json:
        print_json(told)
    else:
        number = "" if told["seq"] is None else f" as number {told['seq']}"
        click.echo(f"sent to {told['listeners']} listeners{number}", err=True)


@click.command()
@click.argument("endpoint", required=False)
@click.option("--topic", help="One topic of the endpoint instead of its own broadcasts.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), help="End with exit code 6 if nothing comes for so many seconds."
)
@click.option(
    "--since", type=click.IntRange(min=0), metavar="N", help="First what the endpoint has kept after number N (0: all)."
)
@click.option("--epoch", help="The life of the topic that N is from; in another one all that is kept comes.")
@grace_option
@broker_options
def listen(
    endpoint: str | None, topic: str | None, count: int | None, timeout: float | None, since: int | None,
    epoch: str | None, grace: float, url: str | None, token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the broadcasts of ENDPOINT, a line each, until Ctrl-C; without ENDPOINT those to everybody."""
    if epoch is not None and since is None:
        raise Failure(Exit.USAGE, "--epoch goes with --since")

    async def follow(client: AsyncClient) -> None:
        left = count
        async with await client.subscribe(endpoint, topic=topic, since=since, epoch=epoch) as messages:
            click.echo(f"listening to {messages} at {client.url}{_life(messages)}", err=True)
            while left is None or left > 0:
                _print(await messages.get(timeout), as_json)
                left = None if left is None else left - 1

    try:
        run(follow, url, token, as_json, reconnect=True, grace=grace)
    except TimeoutError as error:
        raise Failure(Exit.DEADLINE, str(error)) from None
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None


def _life(messages: Subscription) -> str:
    return f" (epoch {messages.epoch})" if messages.epoch else ""


def _print(message: Message, as_json: bool) -> None:
    raw, attachments = encode(message.data)
    data = msgspec.Raw(expand(raw, attachments) if attachments else raw)
    if not as_json:
        print_json(data)
        return
    view: dict[str, Any] = {"endpoint": message.endpoint, "topic": message.topic, "seq": message.seq}
    if message.missed:
        view["missed"] = message.missed
    print_json(view | {"data": data})
