"""From scores to optimiser steps."""
