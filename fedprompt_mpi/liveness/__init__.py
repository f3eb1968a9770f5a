"""No job hangs and every end has a reason: deadlines, stalled and lost ranks, requests to stop, exit statuses."""
