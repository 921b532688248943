from tests.tiny_models import make_trainer, tiny_checkpoint  # noqa: F401  (fixtures)
