"""The page at `/docs`, through the real routes."""

import base64
import hashlib
import re
import sys

import pytest
from asking import client, is_problem
from served import Served, redis_only

from cerberus.api import pages

pytestmark = pytest.mark.anyio


@pytest.fixture
def environ(servers):
    return redis_only(servers)


@pytest.fixture
async def served(environ):
    async with Served(environ) as served:
        yield served


async def test_the_files_of_the_page_are_served_with_their_types_and_no_others(http):
    for name, kind in pages.FILES.items():
        answer = await http.get(f"/docs/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert int(answer.headers["content-length"]) == len(answer.content) > 100_000
        assert "max-age" in answer.headers["cache-control"]
        again = {"If-None-Match": answer.headers["etag"]}
        assert (await http.get(f"/docs/{name}", headers=again)).status_code == 304
    for name in ("swagger-ui.js", "..%2fflask_swagger_ui.py", "%2e%2e/__init__.py", "LICENSE", ""):
        is_problem(await http.get(f"/docs/{name}"), "not_found")


def test_serving_the_page_imports_nothing_of_the_package_that_ships_it():
    assert pages._files()
    assert "flask" not in sys.modules
    assert pages._PACKAGE not in sys.modules


async def test_a_browser_is_asked_for_the_key_and_gets_nothing_else(environ):
    served = Served(environ, api_keys=("first-key",))
    async with client(served.app()) as http:
        asked = await http.get("/docs", headers={"Accept": "text/html,*/*;q=0.8"})
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"] == "Bearer"
        assert asked.headers["content-type"].startswith("text/html")
        page = await http.get("/docs", headers={"X-API-Key": "first-key"})
        assert (page.status_code, page.text) == (200, asked.text)
        for path in ("/openapi.json", *(f"/docs/{name}" for name in pages.FILES)):
            refused = await http.get(path, headers={"Accept": "text/html"})
            is_problem(refused, "unauthorized")
            assert (await http.get(path, headers={"X-API-Key": "first-key"})).status_code == 200
    await served.close()


async def test_the_script_of_the_page_is_the_one_that_its_policy_allows(http):
    answer = await http.get("/docs")
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}' blob:" in policy
    assert not re.search(r"\w+://|unsafe-eval", policy + answer.text)
    assert "validatorUrl: null" in script
