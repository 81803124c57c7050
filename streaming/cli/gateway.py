"""`imagestream gateway`: publish images and read predictions over HTTP."""

from typing import Annotated

import typer

from streaming.cli.app import JsonOption, PortOption, app, settings_of, write_json
from streaming.cli.command_line import IMAGES
from streaming.cli.console import out
from streaming.errors import ConfigurationError

HEADERS_BYTES = 8192  # upper bound of the key and headers of a message from the gateway
ACKNOWLEDGE_TIMEOUT_S = 15.0


@app.command(panel=IMAGES, settings=("topic", "bootstrap_servers", "gateway_port"))
def gateway(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; any other than loopback requires an API key.")] = (
        "127.0.0.1"
    ),
    port: PortOption = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
    json: JsonOption = None,
) -> None:
    """Serve an HTTP API that accepts images and returns predictions, until Ctrl-C.

    POST /v1/images publishes an image, GET /v1/predictions/ID returns its prediction, /docs describes all routes. The
    API keys are read from the file named by IMAGESTREAM_GATEWAY_API_KEY_FILE, one per line; without a key, only this
    machine has access.

    Example: imagestream gateway --port 8080
    """
    from producer.message import MAX_MESSAGE_BYTES
    from producer.sender import Sender
    from streaming.gateway.access import check_binding, read_keys
    from streaming.gateway.app import create_app
    from streaming.gateway.serve import listen, make_server
    from streaming.gateway.service import Broker
    from streaming.platform.broker import bootstrap_servers as home_servers
    from streaming.platform.kafka_security import client_arguments
    from streaming.platform.topic import TopicOperation, check_access
    from streaming.signals import stop_signals

    settings = settings_of(context)
    port = settings.gateway_port if port is None else port
    keys = read_keys(settings.gateway_api_key_file)
    check_binding(host, keys)
    servers, client = home_servers(settings), client_arguments(settings)
    check_access(servers, settings.topic, client, TopicOperation.WRITE)
    sender = Sender(servers, settings.topic, delivery_timeout_s=ACKNOWLEDGE_TIMEOUT_S, client=client)
    try:
        largest = min(MAX_MESSAGE_BYTES, sender.max_message_bytes - HEADERS_BYTES)
        if largest <= 0:
            raise ConfigurationError(
                f"topic {settings.topic} accepts messages of {sender.max_message_bytes:,} bytes, too few for an "
                f"image: raise its max.message.bytes"
            )
        broker = Broker(largest, sender.send, sender.answers, ACKNOWLEDGE_TIMEOUT_S)
        with listen(host, port) as listener:
            url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            write_json(json, {"url": url, "topic": settings.topic, "max_image_bytes": largest})
            out.print(f"gateway: {url}/docs")
            server = make_server(
                create_app(settings, broker, keys), access_log=access_log, log_format=settings.log_format
            )
            with stop_signals():  # uvicorn raises the signal again after its shutdown: ignore it then
                server.run(sockets=[listener])
    finally:
        sender.close()
