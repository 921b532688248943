"""The subcommands of ``fastvideo-grpo``, one file each: ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""
