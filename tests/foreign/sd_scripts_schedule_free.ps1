# A style LoRA with a schedule-free optimizer, in PowerShell.
$model = "./models/base.safetensors"
accelerate launch --num_cpu_threads_per_process=8 "./sd-scripts/train_network.py" `
  --pretrained_model_name_or_path=$model `
  --train_data_dir="./data/style" `
  --output_dir="./output" --output_name="style_sf" `
  --resolution="640,640" --enable_bucket --min_bucket_reso=256 --max_bucket_reso=1024 `
  --network_module="networks.lora" --network_dim=64 --network_alpha=32 --network_train_unet_only `
  --optimizer_type="AdamWScheduleFree" --optimizer_args "weight_decay=0.01" `
  --learning_rate="2e-4" --lr_scheduler="constant" --lr_warmup_steps=100 `
  --max_train_epochs=8 --train_batch_size=2 --clip_skip=2 `
  --mixed_precision="fp16" --save_precision="fp16" --xformers --cache_latents `
  --shuffle_caption --caption_separator=";" --keep_tokens=2 --caption_extension=".txt" `
  --seed=1337 --noise_offset=0.05 --multires_noise_iterations=8 --multires_noise_discount=0.2
