"""Turn an answer of Redis about a wrong setting into one sentence."""

import ssl

import redis.exceptions

from cerberus import errors


def sentence(error: BaseException) -> errors.ConfigError | None:
    """Say which setting Redis refuses; None if the error has another cause."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return errors.FeaturesRefused(
                f"REDIS_URL: the certificate of Redis is refused: {seen.verify_message}; "
                "ssl_ca_certs must hold its CA, or REDIS_TLS_VERIFY=0 accepts any"
            )
        said = str(seen).partition("\n")[0]
        if isinstance(
            seen,
            redis.exceptions.AuthenticationError
            | redis.exceptions.AuthenticationWrongNumberOfArgsError,
        ):
            return errors.FeaturesRefused(f"REDIS_URL: Redis refuses the user or password: {said}")
        if isinstance(seen, redis.exceptions.ResponseError) and "DB index" in said:
            return errors.FeaturesRefused(
                f"REDIS_URL: Redis has no database with this number: {said}"
            )
        if "Cluster mode is not enabled" in said:
            return errors.FeaturesRefused(
                "REDIS_CLUSTER is 1, but REDIS_URL is not a node of a Redis Cluster: set it to 0"
            )
        seen = seen.__cause__ or seen.__context__
    return None
