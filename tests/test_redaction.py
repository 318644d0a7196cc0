"""What is written of settings, and what is not."""

import pytest

from acetate.redaction import redacted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"api_key": "HUSH", "wandb_token": "HUSH", "clientSecret": "HUSH", "passwd": 123},
         {"api_key": "***", "wandb_token": "***", "clientSecret": "***", "passwd": "***"}),
        ({"storage_options": {"s3": {"anon": True, "user": "HUSH", "retries": [1]}}},
         {"storage_options": {"s3": {"anon": True, "user": "***", "retries": ["***"]}}}),
        ({"prompt_tokens": 128, "api_key": None, "keys": ["HUSH", ""]},
         {"prompt_tokens": 128, "api_key": None, "keys": ["***", ""]}),
        ("https://me:HUSH@host/a@b", "https://***@host/a@b"),
        ("https://HUSH@github.com/a", "https://***@github.com/a"),
        ("s3://bucket/a?X-Amz-Signature=HUSH&part=1", "s3://bucket/a?X-Amz-Signature=***&part=***"),
        ("https://host/a?sig=HUSH#x", "https://host/a?sig=***#x"),
        ("parsing 'https://host/a?sig='HUSH HUSH''", "parsing 'https://host/a?sig=***'"),
        (["train.py", "+data.remote.storage_options.s3.user=HUSH", "lr=1"],
         ["train.py", "+data.remote.storage_options.s3.user=***", "lr=1"]),
        ("+data.remote={storage_options: {s3: {user: HUSH}}}", "+data.remote=***"),
        ("data.shards={https://me:HUSH@host/a: 1}", "data.shards={https://***@host/a: 1}"),
        ("prompt=a key to the secret garden", "prompt=a key to the secret garden"),
        ("hub_token=null", "hub_token=null"),
        ({"task": {"lr": 1e-3, "betas": (0.9, 1)}}, {"task": {"lr": 1e-3, "betas": [0.9, 1]}}),
    ],
)  # fmt: skip
def test_secrets_are_left_out(value, shown):
    before = repr(value)
    assert redacted(value) == shown
    assert repr(value) == before
