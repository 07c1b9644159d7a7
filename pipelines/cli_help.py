"""--help that ends with the sections of settings a command takes, from the settings themselves."""

from typing import Any

from typer.core import TyperCommand


class WithSettings(TyperCommand):
    """A command with --set; its settings are imported only when its help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Sections, a line each. (Typer has a click of its own, whose types it does not export.)"""
        from pipelines.settings import BATCH, REFRESH, SECTIONS, TRAINING
        from pipelines.settings_text import summary

        of = {"run": TRAINING, "refresh-trends": REFRESH, "batch-recommend": BATCH}
        names = of.get(ctx.info_name or "", tuple(SECTIONS))
        with formatter.section("Settings (`hrnn settings SECTION` tells its keys)"):
            formatter.write_dl([(name, summary(SECTIONS[name])) for name in names])
