"""The live page in a real browser."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from kvloom.engine.ask import Served
from tests.browser import opened
from tests.serving import TOY, Toy, serving


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_lives(nano: Any, scheme: str) -> None:
    toy = Toy(pause=0.01)
    served = Served(["toy <b>model</b>"], nano[1], TOY, 4096, [1], recipe="kivi(bits=4)")
    body = {"prompt": "One two", "max_tokens": 400, "stream": True, "n": 3}
    with serving(toy, served) as site, opened(f"{site.url}/") as browser:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )

        def text(name: str) -> str:
            return str(browser.find_element("id", name).text)

        site.until(lambda: text("state") == "live")
        assert text("model") == "toy <b>model</b>" and text("recipe") == "kivi(bits=4)"
        with httpx.stream("POST", f"{site.url}/v1/completions", json=body):
            site.until(lambda: text("running") == "3")
            site.until(lambda: int(text("out").replace(",", "")) > 10 and "ms" in text("itl"))
            assert (
                text("kinds") == "full 300 B" and text("tiers") == "memory of caches 300 B" and text("hits") == "50.0 %"
            )
        site.until(lambda: text("running") == "0" and "abort 3" in text("ended"))
        lines = browser.find_elements("css selector", "polyline")
        assert len(lines) == 6 and all(len(line.get_attribute("points").split()) > 2 for line in lines)
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[scheme]
        width = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert width <= 0, "nothing sticks out"
