"""For all tests: hypothesis does not judge by the time that an example takes, for tests never assert on time; fixtures
that its examples share are only folders."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "hethub",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hethub")
