"""What a plan would have said: the forecast that stands beside a measurement.

Forecasts are of this machine as `mimo-edge probe` measured it, with the threads it measured with;
without a probe there are none, because an assumed rate says nothing about a measured one.
"""

from __future__ import annotations

from mimo_edge.bench.cases import Case, Settings
from mimo_edge.bench.results import Row
from mimo_edge.devices.profile import DeviceProfile
from mimo_edge.errors import MimoEdgeError
from mimo_edge.planner.forecast import Forecast
from mimo_edge.planner.model import PlannedModel, planned_model
from mimo_edge.planner.planning import plan

# Drawn ids are never what a draft proposed.
_NEVER = (0.0, 0.0, 0.0)


class Forecasts:
    """Forecasts for the cases of one run."""

    def __init__(self, settings: Settings, device: DeviceProfile) -> None:
        """Raises the errors of opening the model."""
        self._settings, self._device = settings, device
        self._model: PlannedModel = planned_model(settings.model, device, None)

    def tps(self, row: Row) -> float | None:
        """Tokens per second a plan says for what `row` measured; None as `of`."""
        found = self.of(row)
        if found is None:
            return None
        return found.prefill.tps if row.case.kind == "prefill" else found.decode.tps

    def of(self, row: Row) -> Forecast | None:
        """The forecast for what `row` measured; None where there is none: on other backends, with
        other threads than the probe's, or where nothing was measured."""
        case, run = row.case, row.runs[0] if row.runs else {}
        if run.get("backend") != "ggml" or case.threads != self._device.threads:
            return None
        return self._forecast(case, run.get("context"), run.get("tokens") == "drawn")

    def _depth(self, case: Case) -> int:
        """Tokens in the conversation half-way through what is measured: one piece of an answer
        after the other, or with a prompt the same piece again and again."""
        s = self._settings
        if s.prompt is not None:
            return case.depth + case.tokens // 2
        return case.depth + s.warmup + s.repetitions * case.tokens // 2

    def _forecast(self, case: Case, context: int | None, drawn: bool) -> Forecast | None:
        length = context or self._device.context
        depth = min(self._depth(case), length - 1) if case.kind == "decode" else 0
        # Without a cap all weights are resident, as they were when it ran.
        ram = self._device.ram_bytes if case.ram is None else case.ram
        try:
            made = plan(
                self._model,
                self._device,
                ram,
                length,
                kv_type=self._settings.kv_type,
                draft=case.draft,
                depth=depth,
                prompt=case.tokens if case.kind == "prefill" else 1,
                # Drawn ids with random weights: no expert is more likely than another.
                routes="uniform" if drawn and self._model.heat is None else None,
                acceptance=_NEVER if drawn else None,
                advise=False,
            )
        except MimoEdgeError:
            return None  # what ran here cannot be planned on the profile, as another cache format
        return made.forecast
