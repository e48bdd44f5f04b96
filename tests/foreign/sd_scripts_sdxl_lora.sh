#!/bin/bash
MODEL="./models/sd_xl_base_1.0.safetensors"
NAME="still_life"

accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 sdxl_train_network.py \
  --pretrained_model_name_or_path "$MODEL" \
  --train_data_dir ./data/still_life \
  --output_dir ./output --output_name "${NAME}_xl" \
  --resolution 1024,1024 --enable_bucket --min_bucket_reso 512 --max_bucket_reso 2048 \
  --network_module networks.lora --network_dim 32 --network_alpha 16 --network_train_unet_only \
  --learning_rate 1e-4 --unet_lr 1e-4 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \
  --optimizer_type Adafactor --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" \
  --train_batch_size 1 --max_train_epochs 10 --save_every_n_epochs 2 \
  --mixed_precision bf16 --save_precision fp16 --gradient_checkpointing --sdpa \
  --cache_latents --cache_latents_to_disk --caption_extension .txt --no_half_vae \
  --loss_type huber --huber_schedule snr --huber_c 0.1 --min_timestep 0 --max_timestep 1000 \
  --seed 42 --max_data_loader_n_workers 0
