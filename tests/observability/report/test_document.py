"""The frame of all pages."""

from __future__ import annotations

import pytest

from megatron_vppo.observability.report.document import document_html


@pytest.mark.parametrize("charts", [True, False])
def test_a_page_is_one_file_and_its_title_is_text(charts: bool) -> None:
    html = document_html('a <b> & "c"', "<main>body</main>", charts=charts)
    assert "<title>a &lt;b&gt; &amp; &quot;c&quot;</title>" in html
    assert html.startswith("<!doctype html>") and html.endswith("</body></html>")
    assert "<main>body</main>" in html and "src=" not in html and "<link" not in html and "path.line" in html
    assert ('id="tip"' in html) == charts == ("querySelectorAll" in html)
