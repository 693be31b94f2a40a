"""The tables of the diffusers-torchao README, with a column of ours: memory and time of diffusion pipelines by recipe.

python -m benchmarks.gpu_recipes --model black-forest-labs/FLUX.1-dev --device cuda
python -m benchmarks.gpu_recipes --tiny
"""
