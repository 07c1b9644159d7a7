"""The Grafana dashboard as code.

    python -m k8s.monitoring.dashboards     # writes k8s/monitoring/hrnn-meta.json

Rows go from what users feel to why: answers, speed, degradation, freshness, model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

OUTPUT = Path(__file__).parent / "hrnn-meta.json"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "[$__rate_interval]"
T, P, C = 'role="transformer"', 'role="predictor"', 'role="collector"'


@dataclass(frozen=True)
class Plot:
    """One panel: what it shows, in words and in PromQL (legend → expression)."""

    title: str
    about: str
    unit: str
    queries: dict[str, str]
    single: bool = False  # one number instead of a curve
    width: int = 8


def _quantile(q: float, metric: str, selector: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    inner = f"sum by ({labels}) (rate({metric}_bucket{{{selector}}}{RATE}))"
    return f"histogram_quantile({q}, {inner})"


def _mean(metric: str, by: str = "") -> str:
    over = f"sum by ({by})" if by else "sum"
    return f"{over} (rate({metric}_sum{RATE})) / {over} (rate({metric}_count{RATE}))"


ROWS: dict[str, list[Plot]] = {
    "Answers": [
        Plot(
            "Requests",
            "Answered requests per second by outcome.",
            "reqps",
            {"{{outcome}}": f"sum by (outcome) (rate(hrnn_requests_total{{{T}}}{RATE}))"},
        ),
        Plot(
            "Failing share",
            "Share of requests that failed through our fault (error, unavailable).",
            "percentunit",
            {
                "failing": (
                    f'(sum(rate(hrnn_requests_total{{{T}, outcome=~"error|unavailable"}}{RATE}))'
                    " or vector(0))"
                    f" / sum(rate(hrnn_requests_total{{{T}}}{RATE}))"
                )
            },
        ),
        Plot(
            "In flight",
            "Requests being answered at the moment.",
            "short",
            {"{{role}}": "sum by (role) (hrnn_requests_in_flight)"},
        ),
    ],
    "Speed": [
        Plot(
            "Time to answer",
            "Transformer, all tasks.",
            "s",
            {
                f"p{int(q * 100)}": _quantile(q, "hrnn_request_duration_seconds", T)
                for q in (0.5, 0.95, 0.99)
            },
        ),
        Plot(
            "Stages, p99",
            "Where the time goes: features, predictor, ranking; in the predictor: model, "
            "candidates.",
            "s",
            {"{{stage}}": _quantile(0.99, "hrnn_stage_duration_seconds", "", "stage")},
        ),
        Plot(
            "Rounds until exact, p99",
            "Calls to the predictor until the top-k was proved; 1 is the rule.",
            "short",
            {"p99": _quantile(0.99, "hrnn_threshold_rounds", T)},
        ),
        Plot(
            "Worked on together",
            "Mean number of requests that the transformer puts in one call and the predictor "
            "answers by one use of the model; it grows with the load.",
            "short",
            {"{{role}}": _mean("hrnn_batched_requests", "role")},
            width=12,
        ),
        Plot(
            "Instances of a request",
            "Mean number; a jump explains slower answers.",
            "short",
            {"{{role}}": _mean("hrnn_request_instances", "role")},
            width=12,
        ),
    ],
    "Degradation": [
        Plot(
            "Degraded answers",
            "Per second by reason; every reason is also in the answer itself.",
            "reqps",
            {"{{reason}}": f"sum by (reason) (rate(hrnn_fallbacks_total{RATE}))"},
        ),
        Plot(
            "Feature reads that fail",
            "Per second by read and kind.",
            "reqps",
            {"{{read}} {{kind}}": f"sum by (read, kind) (rate(hrnn_feature_errors_total{RATE}))"},
        ),
        Plot(
            "Predictor calls that fail",
            "Per second by kind, seen from the transformer; retried ones broke and were repeated.",
            "reqps",
            {
                "{{kind}}": f"sum by (kind) (rate(hrnn_predictor_errors_total{RATE}))",
                "retried": f"sum(rate(hrnn_predictor_retries_total{RATE}))",
            },
        ),
    ],
    "Freshness": [
        Plot(
            "Trend age",
            "Now minus the moment the trend in use was counted for; on a live log near the refresh "
            "interval.",
            "s",
            {"age": f"max(hrnn_trend_age_seconds{{{T}}})"},
        ),
        Plot(
            "Log ahead of the trend",
            "How far the log has gone on since the trend was counted, and how often it is expected "
            "anew; three periods are too many.",
            "s",
            {
                "ahead": f"max(hrnn_trend_lag_seconds{{{T}}})",
                "period": f"max(hrnn_trend_period_seconds{{{T}}})",
            },
        ),
        Plot(
            "Since the trend was last read",
            "Should stay at a few seconds.",
            "s",
            {"since": f"time() - max(hrnn_trend_last_read_timestamp_seconds{{{T}}})"},
        ),
        Plot(
            "Unknown users and items",
            "Per second: users the feature store lacks, items the model does not know.",
            "reqps",
            {
                "users": f"sum(rate(hrnn_unknown_users_total{RATE}))",
                "items": f"sum(rate(hrnn_unknown_items_total{RATE}))",
            },
        ),
    ],
    "Events": [
        Plot(
            "Events by outcome",
            "Per second; duplicates are repeated sends, user_deleted come after a deletion.",
            "reqps",
            {"{{outcome}}": f"sum by (outcome) (rate(hrnn_collector_events_total{RATE}))"},
        ),
        Plot(
            "Events and requests refused",
            "Per second by reason; 429 and 5xx are queue_full, busy, log_unavailable, deadline, "
            "storage_full.",
            "reqps",
            {"{{reason}}": f"sum by (reason) (rate(hrnn_collector_refused_total{RATE}))"},
        ),
        Plot(
            "Time to make events durable",
            "99 of 100 requests and transactions take at most this long.",
            "s",
            {
                "request p99": _quantile(
                    0.99, "hrnn_collector_request_duration_seconds", 'operation="events"'
                ),
                "commit p99": _quantile(0.99, "hrnn_collector_commit_duration_seconds", C),
            },
        ),
        Plot(
            "Until an event is visible",
            "From its commit until the online store has it.",
            "s",
            {f"p{q:g}": _quantile(q / 100, "hrnn_collector_visible_seconds", C) for q in (50, 99)},
        ),
        Plot(
            "Online store behind the event log",
            "Age of the oldest event that recommendations do not see; following is 1 while all "
            "collectors can write the online store.",
            "s",
            {
                "behind": "max(hrnn_collector_lag_seconds)",
                "following": "min(hrnn_collector_following)",
            },
        ),
        Plot(
            "Writes that wait",
            "Events and upserts between being read and being durable; beyond max_queued_writes "
            "further ones are refused.",
            "short",
            {"{{pod}}": "hrnn_collector_queued_writes"},
        ),
        Plot(
            "Collector requests",
            "Per second by operation and status.",
            "reqps",
            {
                "{{operation}} {{status}}": "sum by (operation, status) "
                f"(rate(hrnn_collector_requests_total{RATE}))"
            },
            width=6,
        ),
        Plot(
            "Writes of a commit",
            "Mean number of events and upserts that became durable together.",
            "short",
            {"writes": _mean("hrnn_collector_commit_writes")},
            width=6,
        ),
        Plot(
            "Collector failures",
            "Per second: transactions by kind, attempts to bring the online store up to date, and "
            "keys there that held something else than features and were replaced.",
            "reqps",
            {
                "commit {{kind}}": (
                    f"sum by (kind) (rate(hrnn_collector_commit_errors_total{RATE}))"
                ),
                "follow": f"sum(rate(hrnn_collector_follow_errors_total{RATE}))",
                "replaced": f"sum(rate(hrnn_collector_replaced_keys_total{RATE}))",
            },
            width=6,
        ),
        Plot(
            "Changes still to be applied",
            "Changes of the log that the online store lacks; erasing is 1 while the log's file "
            "still holds bytes of deleted rows.",
            "short",
            {
                "changes": "max(hrnn_collector_lag_changes)",
                "erasing": "max(hrnn_collector_erasing)",
            },
            width=6,
        ),
        Plot(
            "New items",
            "Items served from their metadata because no model was trained with them yet, and "
            "those left out as too many.",
            "short",
            {
                "served": f"max(hrnn_live_items{{{P}}})",
                "left out": f"max(hrnn_live_items_left_out{{{P}}})",
                "s of the last build": f"max(hrnn_live_items_build_seconds{{{P}}})",
            },
            width=12,
        ),
        Plot(
            "New items that cannot be served",
            "Failed attempts and left out values per second, and since when the feed was not read.",
            "short",
            {
                "{{step}}": f"sum by (step) (rate(hrnn_item_feed_errors_total{{{P}}}{RATE}))",
                "values that do not fit": (
                    f"sum(rate(hrnn_live_item_values_unfit_total{{{P}}}{RATE}))"
                ),
                "s since the last read": (
                    f"time() - max(hrnn_item_feed_last_read_timestamp_seconds{{{P}}} > 0)"
                ),
            },
            width=12,
        ),
    ],
    "What is served": [
        Plot(
            "Catalogue coverage",
            "Distinct items recommended in the last full ten minutes, as a share of the catalogue.",
            "percentunit",
            {"{{pod}}": f"hrnn_served_coverage{{{T}}}"},
            width=12,
        ),
        Plot(
            "Popularity of what is served",
            "Mean place of an answer's items among the trending ones, as a share of the catalogue; "
            "near 0 everybody gets the most popular ones.",
            "percentunit",
            {f"p{q:g}": _quantile(q / 100, "hrnn_served_trend_rank", T) for q in (10, 50, 90)},
            width=12,
        ),
        Plot(
            "Exploration share",
            "Items in answers that are there because of exploration alone.",
            "percentunit",
            {
                "explored": (
                    f"sum(rate(hrnn_explored_items_total{{{T}}}{RATE}))"
                    f" / sum(rate(hrnn_served_items_total{{{T}}}{RATE}))"
                )
            },
            width=12,
        ),
        Plot(
            "Refused and cut off",
            "Requests per second refused because too much was in flight; circuits that are open.",
            "short",
            {
                "shed by the {{role}}": (
                    f'sum by (role) (rate(hrnn_requests_total{{outcome="shed"}}{RATE}))'
                ),
                "{{dependency}} not asked": "sum by (dependency) (hrnn_circuit_open)",
            },
            width=12,
        ),
    ],
    "Model": [
        Plot(
            "Versions",
            "Predictors by model version; two versions for long means a stuck roll-out.",
            "short",
            {"{{version}}": f"count by (version) (hrnn_model_info{{{P}}} == 1)"},
        ),
        Plot(
            "Model changes",
            "New champions by what became of them; refused or unreadable ones leave the model "
            "before in use.",
            "short",
            {
                "{{outcome}}": "sum by (outcome) "
                f"(increase(hrnn_model_refreshes_total{{{P}}}{RATE}))"
            },
        ),
        Plot(
            "The champion is served",
            "1 while every predictor uses the store's champion; the share of the best items that "
            "its search finds, 1 where it is exact.",
            "short",
            {
                "champion": f"min(hrnn_model_is_champion{{{P}}})",
                "recall": f"min(hrnn_retrieval_recall{{{P}}})",
            },
        ),
        Plot(
            "Bundle load",
            "Time to verify, load and warm up.",
            "s",
            {"load": f"max(hrnn_bundle_load_seconds{{{P}}})"},
            single=True,
        ),
        Plot(
            "Memory",
            "Resident memory of the processes.",
            "bytes",
            {"{{role}} {{pod}}": 'process_resident_memory_bytes{role=~"transformer|predictor"}'},
        ),
    ],
}


def build() -> dashboard.Dashboard:
    """The dashboard, panels laid out row by row."""
    board = (
        dashboard.Dashboard("HRNN-meta")
        .uid("hrnn-meta")
        .description("Recommendations in real time: answers, speed, degradation, freshness.")
        .tags(["hrnn-meta", "recommender"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("utc")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    number = 1
    for title, plots in ROWS.items():
        board = board.with_row(dashboard.Row(title).id(number))
        number += 1
        for plot in plots:
            board = board.with_panel(_panel(plot, number))
            number += 1
    return board


def _panel(plot: Plot, number: int) -> stat.Panel | timeseries.Panel:
    panel: stat.Panel | timeseries.Panel
    if plot.single:
        panel = stat.Panel()
    else:
        panel = (
            timeseries.Panel()
            .line_width(2)
            .fill_opacity(8)
            .min(0)
            .legend(common.VizLegendOptions().show_legend(True).placement("bottom"))
        )
    panel = (
        # Ids and reference letters are not filled in by the SDK.
        panel.id(number)
        .title(plot.title)
        .description(plot.about)
        .unit(plot.unit)
        .datasource(DATASOURCE)
        .height(8)
        .span(plot.width)
    )
    for letter, (legend, expression) in zip("ABCDEF", plot.queries.items(), strict=False):
        panel = panel.with_target(
            prometheus.Dataquery()
            .ref_id(letter)
            .expr(expression)
            .legend_format(legend)
            .datasource(DATASOURCE)
        )
    return panel


def render() -> str:
    """The dashboard as JSON text."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build().build()) + "\n"


def main() -> int:
    OUTPUT.write_text(render())
    print(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
