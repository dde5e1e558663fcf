"""`inferctl admin policy`: how the server stores administrators' changes, and how many there are."""

from typing import Final

from inferflux.ctl.admin.area import Action, Area, read
from inferflux.ctl.client import Answer
from inferflux.ctl.show import print_table

PATH: Final = "/v1/admin/policy"


def _show(answer: Answer) -> None:
    stored = "in a file, encrypted" if answer["encrypted"] else "in a file, not encrypted"
    rows = [
        ("stored", stored if answer["persistent"] else "until the server stops"),
        ("generation", answer["generation"]),
        ("API keys", f"{answer['api_keys']}, {answer['admin_keys']} of them with the scope admin"),
        ("blocked terms", answer["blocked_terms"]),
        ("models loaded, unloaded", f"{answer['loaded_models']}, {answer['unloaded_models']}"),
    ]
    print_table((), rows)


AREA: Final = Area(
    "how administrators' changes are stored",
    "show",
    {"show": Action("the policy store's state and contents", read(PATH), _show)},
)
