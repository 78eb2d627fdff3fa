"""JSON-RPC over WebSocket: `/ws` and `/ws/{endpoint}`."""
