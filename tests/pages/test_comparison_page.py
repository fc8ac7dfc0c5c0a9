import json
import re

import pytest

from volseg.columns import row_of
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.pages.about import About
from volseg.pages.comparison_page import comparison_html


@pytest.mark.parametrize("n", [3, 4, 1000])
def test_a_comparison_of_many_lesions_lists_the_first_and_reads_no_more(n):
    lesions = (row_of(LesionChange, {"patient": "p", "group": number}) for number in range(n))
    patient = row_of(PatientResponse, {"patient": "p", "status": "done"})
    page = comparison_html(About(command="compare"), [patient], lesions, most=3)
    listed = json.loads(re.search(r'id="changes-data">(.*?)</script>', page, flags=re.DOTALL)[1])[
        "rows"
    ]
    assert len(listed) == 3
    assert ("Showing the first 3 lesion rows" in page) == (n > 3)
    assert len(list(lesions)) == max(0, n - 4)
