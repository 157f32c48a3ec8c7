import pytest

from cerberus import environment, errors, kafka, settings

BASE = {
    "KAFKA_BROKER": "127.0.0.1:9092",
    "REDIS_URL": "redis://127.0.0.1:6379",
    "DATABASE_URL": "postgres://u:p@db:5432/x",
}


def test_the_three_addresses_are_all_that_is_needed():
    config = settings.load(BASE)
    assert config.kafka.bootstrap == ("127.0.0.1:9092",)
    assert (config.rate, config.windows.spans, config.tasks) == (
        2.0,
        ("10m",),
        frozenset(settings.TASKS),
    )


@pytest.mark.parametrize("missing", sorted(BASE))
def test_a_missing_address_is_named(missing):
    with pytest.raises(errors.ConfigError, match=missing):
        settings.load({k: v for k, v in BASE.items() if k != missing})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_BROKER", "http://x"),
        ("KAFKA_BROKER", "h:99999"),
        ("KAFKA_BROKER", "user:sesame@h:1"),
        ("KAFKA_PREFIX", "bad topic/"),
        ("REDIS_URL", "http://x"),
        ("REDIS_URL", "redis://h:port"),
        ("REDIS_TLS_VERIFY", "no"),
        ("DATABASE_URL", "mysql://x"),
        ("REDIS_CLUSTER", "yes"),
        ("KAFKA_SASL_MECHANISM", "GSSAPI"),
        ("KAFKA_SASL_MECHANISM", "PLAIN"),
        ("KAFKA_SASL_USERNAME", "u"),
        ("KAFKA_SASL_PASSWORD", "p"),
        ("KAFKA_TRUSTED_CERT", "a certificate, though the brokers speak no TLS"),
        ("KAFKA_CLIENT_CERT", "p"),
        ("CERBERUS_TASKS", "api,cook"),
        ("CERBERUS_RATE", "fast"),
        ("CERBERUS_RATE", "nan"),
        ("CERBERUS_RATE", "inf"),
        ("CERBERUS_RATE", "1e400"),
        ("CERBERUS_RATE", "１"),
        ("CERBERUS_RATE", "1_0"),
        ("CERBERUS_SPANS", "1１m"),
        ("CERBERUS_SEED", "٣"),
        ("CERBERUS_USERS", "1e400"),
        ("REDIS_TLS_VERIFY", "１"),
        ("CERBERUS_SPANS", "1h,10m"),
        ("CERBERUS_SPANS", "10"),
        ("CERBERUS_SPANS", "1h,24d"),
        ("CERBERUS_RETENTION_DAYS", "29"),
        ("CERBERUS_PARTITIONS", "1.5"),
        ("CERBERUS_CURRENCY", "usd"),
        ("CERBERUS_LABEL_MATURITY_DAYS", "-1"),
        ("CERBERUS_FRIENDLY_FRAUD_IS_FRAUD", "yes"),
        ("CERBERUS_SYNTHETIC_LABEL_DELAY_S", "soon"),
        ("CERBERUS_LOG_LEVEL", "LOUD"),
        ("CERBERUS_STACK", "docker"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(errors.ConfigError, match=name):
        settings.load({**BASE, name: value})


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("KAFKA_BROKER", "https://user:sesame@h:1"),
        ("KAFKA_BROKER", "user:sesame@h:1"),
        ("REDIS_URL", "redis://:sesame/x@h:6379"),
        ("DATABASE_URL", "postgres://user:sesame#x@h/d"),
        ("DATABASE_URL", "postgres://user:sesame?x@h/d"),
    ],
)
def test_a_secret_in_a_wrong_address_is_not_repeated(name, address):
    with pytest.raises(errors.ConfigError, match=name) as caught:
        settings.load(BASE | {name: address})
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("parameter", ["bogus=1", "socket_timeout=abc"])
def test_a_parameter_that_redis_does_not_know_is_a_setting_s_fault(parameter):
    with pytest.raises(errors.ConfigError, match="REDIS_URL"):
        settings.load(BASE | {"REDIS_URL": f"redis://h?{parameter}"})


def test_a_platform_s_addresses_are_understood():
    environ = {k: v for k, v in BASE.items() if k != "KAFKA_BROKER"} | {
        "KAFKA_URL": "kafka+ssl://a.example:9096,kafka+ssl://b.example:9096",
        "KAFKA_PREFIX": "north-1.",
        "REDIS_TLS_URL": "rediss://:p@r:6380",
        "REDIS_TLS_VERIFY": "0",
    }
    config = settings.load(environ)
    assert config.kafka.bootstrap == ("a.example:9096", "b.example:9096")
    assert config.kafka.tls
    assert config.kafka.topic("transactions") == "north-1.transactions"
    assert config.redis.url == "rediss://:p@r:6380/0"
    assert config.rate == 0
    assert "CERBERUS_RATE" in config.rate_reason


@pytest.mark.parametrize("names", [["TRUSTED_CERT"], ["CLIENT_CERT", "CLIENT_CERT_KEY"]])
@pytest.mark.parametrize("pem", ["sesame", "sesäme", "sesame\udcff", "-----BEGIN CERTIFICATE-----"])
def test_a_broken_certificate_is_a_setting_s_fault(names, pem):
    told = {f"KAFKA_{name}": pem for name in names}
    config = settings.load(BASE | {"KAFKA_BROKER": "kafka+ssl://h:1"} | told)
    with pytest.raises(errors.ConfigError, match="KAFKA_TRUSTED_CERT") as caught:
        kafka.client_options(config.kafka)
    assert "ses" not in str(caught.value)


def test_secrets_do_not_show():
    secret = ("CERBERUS_API_KEY", "KAFKA_SASL_PASSWORD", "KAFKA_CLIENT_CERT_KEY")
    tls = {"KAFKA_BROKER": "kafka+ssl://h:1", "KAFKA_CLIENT_CERT": "c"}
    address = {"REDIS_URL": "redis://:sesame@r:6379", "DATABASE_URL": "postgres://u:sesame@db/x"}
    login = {"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "u"}
    config = settings.load(BASE | tls | address | login | dict.fromkeys(secret, "sesame"))
    assert config.kafka.sasl_password == "sesame"
    assert "sesame" not in repr(config)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("CERBERUS_SPAN", "CERBERUS_SPAN is not a setting; did you mean CERBERUS_SPANS?"),
        ("CERBERUS_CLAIM_MS", "CERBERUS_CLAIM_MS is not a setting; did you mean CERBERUS_CLAIM_S?"),
        ("CERBERUS_XYZZY", "CERBERUS_XYZZY is not a setting; `cerberus settings` lists them all"),
    ],
)
def test_an_unknown_variable_is_named_with_the_one_that_is_most_like_it(name, sentence):
    with pytest.raises(errors.ConfigError) as caught:
        settings.load(BASE | {name: "1"})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "name", ["SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "API_PORT_80_TCP_ADDR"]
)
def test_what_a_platform_says_of_a_service_of_our_name_is_no_setting(name):
    assert settings.load(BASE | {f"CERBERUS_{name}": "tcp://10.0.0.1:8000"}) == settings.load(BASE)


def test_every_declared_default_can_be_given():
    defaults = {
        variable.name: variable.default
        for variable in environment.declared(settings.Settings)
        if variable.default != environment.REQUIRED
    }
    assert settings.load(BASE | defaults) == settings.load(BASE)


def test_no_variable_is_declared_twice():
    names = [variable.name for variable in environment.declared(settings.Settings)]
    assert len(names) == len(set(names)) > 40
