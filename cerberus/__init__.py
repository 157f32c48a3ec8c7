"""Cerberus: card-fraud decisions in real time, in one asyncio process."""
