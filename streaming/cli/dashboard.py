"""`imagestream dashboard`: monitor and operate the service in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from producer.message import Delivery, Message
from streaming.cli.app import PortOption, app, settings_of
from streaming.cli.command_line import OPERATION
from streaming.cli.console import out

SCRIPT = Path(__file__).parent / "dashboard_app.py"
DELIVERY_S = 15.0


@app.command(panel=OPERATION, settings=("dashboard_port",))
def dashboard(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than loopback requires a token.")
    ] = "127.0.0.1",
    port: PortOption = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Disable all actions: upload, label, replay and promotion.")
    ] = False,
) -> None:
    """Serve a dashboard of the stream, its predictions, quarantine, models and drift, until Ctrl-C.

    If IMAGESTREAM_DASHBOARD_TOKEN_FILE names a file with a token, browsers must present it. A token is required to
    listen on an address that other machines can reach.

    Example: imagestream dashboard --port 8600
    """
    from producer.errors import PublishError
    from producer.sender import Sender
    from streaming.dashboard.auth import read_token
    from streaming.dashboard.context import Dashboard
    from streaming.dashboard.server import run_dashboard
    from streaming.errors import UnavailableError
    from streaming.platform.broker import bootstrap_servers
    from streaming.platform.kafka_security import client_arguments
    from streaming.platform.topic import TopicOperation, check_access

    settings = settings_of(context)
    port = settings.dashboard_port if port is None else port
    token = read_token(settings.dashboard_token_file) if settings.dashboard_token_file else None

    def post(message: Message) -> Delivery:
        servers, client = bootstrap_servers(settings), client_arguments(settings)
        check_access(servers, settings.topic, client, TopicOperation.WRITE)
        try:
            sender = Sender(servers, settings.topic, delivery_timeout_s=DELIVERY_S, client=client)
            try:
                return sender.send(message).result()
            finally:
                sender.close()
        except PublishError as error:
            raise UnavailableError(f"not published: {error}") from error

    def show_address(address: str) -> None:
        out.print(f"the dashboard is at {address} (Ctrl-C stops it)")

    run_dashboard(Dashboard.of(settings, post, read_only=read_only), SCRIPT, host, port, token, show_address)
