"""For all tests: hypothesis does not judge by the time that an example takes, for tests never assert on time; fixtures
that its examples share are only folders. With HETHUB_EXAMPLES=same it draws the same examples every time, so that a
change is judged by the change (`.ci/run`); else new ones."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "hethub",
    deadline=None,
    derandomize=os.environ.get("HETHUB_EXAMPLES") == "same",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hethub")
