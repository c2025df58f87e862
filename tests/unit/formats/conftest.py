from hypothesis import HealthCheck, settings

# The same examples on every run, however slow the machine.
settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")
