"""Turns the configuration into the bounds of the parts."""

from __future__ import annotations

from broker.config.errors import ConfigError
from broker.config.model import Config
from broker.core.limits import EndpointLimits, Limits
from broker.links.acceptor import AcceptLimits
from broker.links.limits import LinkLimits


def core_limits(config: Config) -> Limits:
    """The router's bounds."""
    limits = config.limits
    return Limits(
        deadline_s=limits.deadline_s,
        deadline_max_s=limits.deadline_max_s,
        deadline_served_max_s=limits.deadline_served_max_s,
        slot_s=limits.slot_ms / 1000,
        queue_max=limits.queue_max,
        in_flight_max=limits.in_flight_max,
        requests_per_s=limits.requests_per_s,
        capacity=limits.capacity,
        message_max_bytes=limits.message_max_bytes,
        endpoints_known_max=limits.endpoints_known_max,
        names_per_session_max=limits.names_per_session_max,
        topics_per_endpoint_max=limits.topics_per_endpoint_max,
        methods_declared_max=limits.methods_declared_max,
        fanouts_max=limits.fanouts_max,
        idle_s=limits.idle_s,
        part_max_bytes=limits.part_max_bytes,
        parts_ahead_max=limits.parts_ahead_max,
        grace_max_s=limits.grace_max_s,
        kept_max_bytes=limits.kept_max_bytes,
        kept_max=limits.kept_max,
        keys_kept_max=limits.keys_kept_max,
        keys_kept_max_bytes=limits.keys_kept_max_bytes,
        keys_kept_s=limits.keys_kept_s,
        sessions_max=limits.sessions_max,
        principal_share=limits.principal_share,
        memory_soft_bytes=limits.memory_soft_bytes,
        memory_hard_bytes=limits.memory_hard_bytes,
        pass_over_s=config.rtcloud.pass_over_s,
        strikes_max=limits.strikes_max,
        start_grace_s=limits.start_grace_s,
    )


def endpoint_limits(config: Config) -> dict[str, EndpointLimits]:
    """What is configured of single endpoints."""
    return {
        name: EndpointLimits(
            policy=endpoint.policy,
            queue_max=endpoint.queue_max,
            deadline_s=endpoint.deadline_s,
            deadline_max_s=endpoint.deadline_max_s,
            idle_s=endpoint.idle_s,
            newest_wins=endpoint.newest_wins,
            history=endpoint.history,
            history_s=endpoint.history_s,
            history_max_bytes=endpoint.history_max_bytes,
            closed=endpoint.closed,
        )
        for name, endpoint in config.endpoints.items()
    }


def link_limits(config: Config) -> LinkLimits:
    """The bounds of each link. Raises ConfigError for one with which a link could not work."""
    limits = config.limits
    try:
        return LinkLimits(
            message_max_bytes=limits.message_max_bytes,
            fragments_max=limits.fragments_max,
            outbox_soft_bytes=limits.outbox_soft_bytes,
            outbox_hard_bytes=limits.outbox_hard_bytes,
            outbox_reading_bytes=limits.outbox_reading_bytes,
            stall_s=limits.stall_s,
            close_timeout_s=limits.close_timeout_s,
            ping_interval_s=limits.ping_interval_s,
            ping_timeout_s=limits.ping_timeout_s,
            pings_per_s_max=limits.pings_per_s,
            write_turn_bytes=limits.write_turn_bytes,
        )
    except ValueError as error:
        raise ConfigError(f"limits.{error}") from None


def accept_limits(config: Config) -> AcceptLimits:
    """The bounds of what has not authenticated."""
    limits = config.limits
    return AcceptLimits(
        unauthenticated_max=limits.unauthenticated_max,
        unauthenticated_per_address_max=min(limits.unauthenticated_per_address_max, limits.unauthenticated_max),
        unauthenticated_loopback_max=limits.unauthenticated_max,
        accepts_per_s_max=limits.accepts_per_s,
        first_request_s=limits.header_timeout_s,
    )
