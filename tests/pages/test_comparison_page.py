import json
import re

import pytest

from volseg.pages.comparison_page import comparison_html


@pytest.mark.parametrize("n", [3, 4, 1000])
def test_a_comparison_of_many_lesions_lists_the_first_and_reads_no_more(n):
    lesions = ({"patient": "p", "group": number} for number in range(n))
    page = comparison_html(
        {"command": "compare"}, [{"patient": "p", "status": "done"}], lesions, most=3
    )
    listed = json.loads(re.search(r'id="changes-data">(.*?)</script>', page, flags=re.DOTALL)[1])[
        "rows"
    ]
    assert len(listed) == 3
    assert ("Showing the first 3 lesion rows" in page) == (n > 3)
    assert len(list(lesions)) == max(0, n - 4)
