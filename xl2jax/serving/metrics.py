"""What /metrics shows, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "xl2jax_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.in_flight = Gauge(
            "xl2jax_requests_in_flight", "Requests that were admitted and not answered.", registry=self.registry
        )
        self.waiting = Gauge(
            "xl2jax_questions_waiting", "Questions whose answer has not begun.", registry=self.registry
        )
        self.answering = Gauge("xl2jax_answers_running", "Answers that are being decoded.", registry=self.registry)
        self.cancelled = Counter(
            "xl2jax_questions_cancelled", "Questions whose client went away.", registry=self.registry
        )
        self.first_token = Histogram(
            "xl2jax_time_to_first_token_seconds",
            "From the arrival of a question, by whether its video was watched before.",
            ["watched"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "xl2jax_prompt_tokens", "Tokens of prompts, with those of videos.", registry=self.registry
        )
        self.new_tokens = Counter("xl2jax_generated_tokens", "Tokens of answers.", registry=self.registry)
        self.decode_seconds = Counter("xl2jax_decode_seconds", "Time spent decoding.", registry=self.registry)
        self.frames = Counter("xl2jax_watched_frames", "Frames of videos that were watched.", registry=self.registry)
        self.watch_seconds = Counter(
            "xl2jax_watch_seconds", "Time spent on segments of videos.", registry=self.registry
        )
        self.lookups = Counter(
            "xl2jax_video_lookups",
            "Where the video of a question was found, none: watched.",
            ["place"],
            registry=self.registry,
        )
        self.videos = Gauge("xl2jax_watched_videos", "Watched videos by place.", ["place"], registry=self.registry)
        self.kv_bytes = Gauge(
            "xl2jax_kv_bytes", "Bytes of the KV of watched videos by place.", ["place"], registry=self.registry
        )

        self.live_videos = Gauge("xl2jax_live_videos", "Live videos that are open.", registry=self.registry)
        self.live_frames = Counter(
            "xl2jax_live_frames", "Frames of live videos that were seen.", registry=self.registry
        )
        self.live_dropped = Counter(
            "xl2jax_live_frames_dropped",
            "Frames of live videos that came faster than they could be seen.",
            registry=self.registry,
        )

    def value(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where nothing was counted."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def text(self) -> bytes:
        return generate_latest(self.registry)
