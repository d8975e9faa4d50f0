"""Text to video in small, in the shape of Wan; the model card is README.md beside this file."""

from allears.models.video.config import PRESETS, VideoConfig
from allears.models.video.pipeline import Video, VideoGenerator

__all__ = ["PRESETS", "Video", "VideoConfig", "VideoGenerator"]
