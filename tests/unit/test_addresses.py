"""Which addresses may be written down: none that holds a secret, and all that are in use."""

import pytest

from model.errors import InputError
from pipelines.addresses import check_unsigned, holds_secret


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:SECRET@bucket/x",
        "s3://KEY:SEC/RET@bucket",  # AWS makes such secrets
        "s3://KEY:12/RET@bucket",
        "s3://KEY:SEC#RET@bucket/x",
        "s3://KEY:SEC?RET@bucket/x",
        "s3://KEY:pa[ss@bucket",
        "s3://:SECRET@bucket",
        "simplecache::s3://KEY:SECRET@bucket/x",
        "zip://a.csv::s3://KEY:SECRET@bucket/x.zip",
        "postgresql+psycopg://u:12/34@host/db",
        "postgresql://u@host/db?password=PW",
        "postgresql://u@host/db?sslmode=require&sslpassword=PW",
        "http://u:PW@host",
        "https://TOKEN@host/x",
        "https://TOKEN@host:8080/x",
        "simplecache::https://TOKEN@host/x",
        "https://host/x?api_key=PW",
        "https://host/x?v=1&apikey=PW",
        "https://host/x?v=1;key=PW",
        "https://host/x?code=PW",
        "https://host/x?secret=PW",
        "https://host/x?client_secret=PW",
        "https://host/x?%74oken=PW",
        "https://host/x#access_token=PW",
        "https://host/x?X-Amz-Signature=PW",
        "https://host/x?AWSAccessKeyId=PW",
        "https://host/x?sv=1&sig=PW",
        "http://[host/x",  # nobody can tell what this is
    ],
)
def test_a_secret_is_seen(address):
    assert holds_secret(address)
    with pytest.raises(InputError, match="--items: an address with a password") as raised:
        check_unsigned({"--items": address})
    assert address not in str(raised.value)
    assert not any(part in str(raised.value) for part in ("KEY:", "SEC/", "RET@", "PW", "TOKEN"))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "log.csv",
        "/data/a@b.csv",
        "some:thing@here/log[1].csv",
        "file:///data/a:1@b.csv",
        "sqlite:////data/a@b.db",
        "s3://bucket/a@b.csv",
        "s3://bucket/day=2026-01-31/a:b@c[1].csv",
        "simplecache::s3://bucket/a@b.csv",
        "abfs://container@account.dfs.core.windows.net/x",
        "postgresql://host/db",
        "postgresql://u@host:5432/db?sslmode=require",
        "http://host:8080/a@b.csv",
        "http://[::1]:8080/a@b.csv",
        "https://host/x?country_code=de&signed=no",
        "https://host/x?user=a@b.example",
        "https://host/x#part",
    ],
)
def test_an_address_without_a_secret_passes(address):
    assert not holds_secret(address)
    check_unsigned({"--items": address})
