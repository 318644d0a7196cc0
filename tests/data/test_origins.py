import pytest

from acetate.data.shards import index_shards, read_clip
from acetate.data.store import Remote, open_folder
from tests.servers import serving

TOKENS = {"Authorization": "Bearer HUSH", "X-Api-Key": "HUSH"}


@pytest.mark.parametrize(
    ("login", "options"),
    [
        ("", {"headers": TOKENS}),
        ("", {"client_kwargs": {"headers": TOKENS}}),
        ("", {"http": {"cookies": {"session": "HUSH"}}}),
        ("user:HUSH@", {}),
    ],
)
def test_a_token_stays_with_its_origin(tmp_path, shards, login, options):
    with serving(shards) as other:

        def away(path, headers):
            moved = (307, {"Location": f"{other.url}{path}"}, b"")
            return moved if path.endswith(".tar") else None

        with serving(shards, away) as first:
            url = first.url.replace("http://", f"http://{login}")
            remote = Remote(cache_dir=tmp_path, retries=0, storage_options=options)
            assert read_clip(index_shards([open_folder(url, remote)])[0]).frames.any()
    given = {"Authorization", "X-Api-Key", "Cookie"}
    assert len(first.asked) >= 2 and all(given & set(headers) for _, headers in first.asked)
    assert other.asked and not any(given & set(headers) for _, headers in other.asked)


def test_options_of_an_origin_go_to_it_alone(tmp_path, shards):
    with serving(shards) as one, serving(shards) as two:
        options = {one.url: {"headers": TOKENS}}
        remote = Remote(cache_dir=tmp_path, retries=0, storage_options=options)
        for server in (one, two):
            index_shards([open_folder(server.url, remote)])
    assert all("X-Api-Key" in headers for _, headers in one.asked)
    assert two.asked and not any("X-Api-Key" in headers for _, headers in two.asked)
