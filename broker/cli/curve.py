"""`broker curve`: the keys by which peers over ZeroMQ prove who they are, beyond loopback."""

import time
from pathlib import Path

import click

from broker.auth.token_file import TokenError
from broker.cli.exits import Exit, Failure
from broker.cli.records import moment, print_table
from broker.cli.token import expires_option, file_options, grant_options, opened, row_of


@click.group()
def curve() -> None:
    """Make, allow, list and revoke CURVE keys. A running broker notices within a second."""


@curve.command()
@click.argument("broker_file", type=click.Path(path_type=Path))
@click.argument("own_file", type=click.Path(path_type=Path))
@click.option("--ip", metavar="ADDRESS", help="Where the broker is reached from here.  [default: as BROKER_FILE says]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: file, public_key, url.")
def keys(broker_file: Path, own_file: Path, ip: str | None, *, as_json: bool) -> None:
    """Make a pair of keys, and of the broker's connection file one of one's own, OWN_FILE, with them.

    The public key is printed, in hexadecimal; whoever runs the broker has to allow it. The secret one stands in
    OWN_FILE (0600) only, which must not be there yet.
    """
    import msgspec
    import zmq
    import zmq.utils.z85

    from broker.auth.connection_files import read_connection_file, write_connection_file
    from broker.wire.connection_file import ConnectionFileError

    if own_file.exists():  # the secret half of a key that may have been allowed, and stands nowhere else
        raise Failure(Exit.USAGE, f"{own_file} is there already, maybe with a key in use; name another, or remove it")
    try:
        info = read_connection_file(broker_file)
        server_key = info.curve_serverkey or info.curve_publickey
        if not server_key:
            raise Failure(Exit.USAGE, f"{broker_file} names no key of the broker: is zeromq.curve set there?")
        public, secret = zmq.curve_keypair()
        own = msgspec.structs.replace(
            info, ip=ip or info.ip, curve_serverkey=server_key, curve_publickey=public.decode(),
            curve_secretkey=secret.decode(),
        )  # fmt: skip
        write_connection_file(own_file, own)
    except (ConnectionFileError, OSError) as error:
        raise Failure(Exit.USAGE, str(error)) from None
    name = zmq.utils.z85.decode(public).hex()  # Z85 has characters that shells and options take for theirs
    if as_json:
        click.echo(msgspec.json.encode({"file": str(own_file), "public_key": name, "url": own.url("shell")}))
        return
    click.echo(f"wrote {own_file}; on the broker's machine: broker curve allow NAME KEY, with this key", err=True)
    click.echo(name)


@curve.command(context_settings={"ignore_unknown_options": True})  # a key in Z85 may begin with a hyphen
@click.argument("name")
@click.argument("public_key")
@grant_options
@expires_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what `list` tells.")
@file_options
def allow(
    *,
    name: str,
    public_key: str,
    roles: tuple[str, ...],
    endpoints: tuple[str, ...],
    expires: float | None,
    as_json: bool,
    tokens_file: Path | None,
    config_file: str | None,
) -> None:
    """Let in whoever holds the secret half of PUBLIC_KEY (64 hexadecimal digits, or Z85), as NAME.

    --role and --endpoint may be given several times; in a PATTERN, * stands for any run of characters.
    """
    store = opened(tokens_file, config_file)
    try:
        record, _ = store.create(name, roles, endpoints, expires, curve_key=_in_z85(public_key))
    except TokenError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(row_of(record, time.time())))
        return
    until = "never expires" if record.expires is None else f"expires {moment(record.expires)}"
    roles_text, endpoints_text = ", ".join(record.roles), ", ".join(record.endpoints)
    click.echo(f"key {record.id} of {record.name}: {roles_text} at {endpoints_text}; {until}", err=True)


@curve.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@file_options
def list_keys(as_json: bool, tokens_file: Path | None, config_file: str | None) -> None:
    """List the keys, ended ones too, by their ids; of a key itself only the digest is kept."""
    now = time.time()
    rows = [row_of(record, now) for record in opened(tokens_file, config_file).tokens() if record.kind == "curve"]
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(rows))
    elif rows:
        print_table(rows, ("id", "name", "state", "roles", "endpoints", "created", "expires"))
    else:
        click.echo("no keys; `broker curve allow` lets one in", err=True)


@curve.command()
@click.argument("id_or_name")
@file_options
def revoke(id_or_name: str, tokens_file: Path | None, config_file: str | None) -> None:
    """End the key with this id, or the only valid one of this name. Its live sessions are closed."""
    try:
        record = opened(tokens_file, config_file).revoke(id_or_name, "curve")
    except TokenError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    click.echo(f"key {record.id} of {record.name} revoked {moment(record.revoked or 0.0)}", err=True)


def _in_z85(public_key: str) -> bytes:
    """Raises TokenError for what is no key."""
    import zmq.utils.z85

    if len(public_key) == 64:
        try:
            return zmq.utils.z85.encode(bytes.fromhex(public_key))
        except ValueError:
            pass
    if len(public_key) != 40 or not public_key.isascii():
        raise TokenError("a CURVE public key has 64 hexadecimal digits, or 40 characters (Z85)")
    return public_key.encode()
