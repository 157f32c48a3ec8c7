"""Find out why a broker refuses this process, which aiokafka's clients only log."""

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any

from aiokafka import conn
from aiokafka import errors as refusals

from cerberus import errors

_CONNECT_S = 3.0
_REFUSED = (refusals.AuthenticationFailedError, refusals.SaslAuthenticationFailed)
_OTHER_MECHANISM = (refusals.UnsupportedSaslMechanismError, refusals.IllegalSaslStateError)


async def check(options: Mapping[str, Any]) -> None:
    """Ask the first broker that answers whether it accepts this process; see `refusal`.

    Raises:
        ConfigError: It does not.
    """
    if refused := await refusal(options):
        raise refused


async def refusal(options: Mapping[str, Any]) -> errors.ConfigError | None:
    """Return why the first broker that answers refuses the credentials; None if none does.

    Args:
        options: What every client is built with.

    Deadline: 3 s a broker, 9 s in all.
    """
    access = {k: v for k, v in options.items() if k != "bootstrap_servers"}
    for address in options["bootstrap_servers"][:3]:
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_S):
                opened = await conn.create_conn(host.strip("[]"), int(port), **access)
        except ssl.SSLCertVerificationError as error:
            return errors.ConfigError(
                f"KAFKA_TRUSTED_CERT is not the CA of broker {address}: {error.verify_message}"
            )
        except _REFUSED as error:
            return errors.ConfigError(
                f"KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD: broker {address} refuses them: "
                f"{error}"
            )
        except _OTHER_MECHANISM:
            mechanism = access["sasl_mechanism"]
            return errors.ConfigError(
                f"KAFKA_SASL_MECHANISM: broker {address} does not support {mechanism}"
            )
        except (TimeoutError, OSError, refusals.KafkaError):
            continue
        opened.close()
        return None
    return None
